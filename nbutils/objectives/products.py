"""Matrix products of the head: half-precision factors, float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor


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
