"""Matrix products of the head: half-precision factors, float32 sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_BYTES = 40 * 2**20  # one float32 chunk of logits: 192 rows of GPT-2; larger saves 5 % time and costs memory
CPU_ROWS = 256  # of a chunk on a CPU, at most: reused memory is faster than the new pages of a larger chunk
ROW_BLOCK = 64  # rows come in whole blocks, at least one: odd sizes and fewer rows slow the matrix products


def product_precision(hidden: Tensor) -> Tensor:
    """`hidden` in the precision autocast would multiply it in; layer norms hand it over in float32."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def matrix_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in float32 or wider; half-precision factors are multiplied exactly and summed there.

    `out` is memory for the result, used where the factors are not of half precision.
    """
    left = left.to(right.dtype)
    if right.dtype not in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out=out)
    if right.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_matrix_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place where the precisions agree."""
    if right.dtype == total.dtype:
        total.addmm_(left.to(right.dtype), right)
    else:
        total += matrix_product(left, right)


def chunk_rows(vocab: int, positions: int, device: str = "cpu") -> int:
    """Positions a chunk holds, in whole blocks: `CHUNK_BYTES` of float32 logits say how many chunks there are.

    The chunks are about even: a small last one would cost the memory of the others.
    """
    most = max(1, CHUNK_BYTES // (4 * vocab * ROW_BLOCK)) * ROW_BLOCK
    most = min(most, CPU_ROWS) if device == "cpu" else most
    even = positions / max(1, math.ceil(positions / most))
    return max(1, min(positions, math.ceil(even / ROW_BLOCK) * ROW_BLOCK))
