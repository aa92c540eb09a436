"""A chunk of positions: its logits, what several terms share of them, and the gradients they add to.

One set of buffers serves every chunk: on a CPU a new buffer of a chunk's size costs more than a pass over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nbutils.models import TeacherTarget, matrix_product

SMALLEST_NORM = 1e-8  # below it a vector has no direction: cosine 0 and no gradient (a padded vocabulary has such rows)


class Buffers:
    """Memory of (rows, vocab): as many buffers as one chunk needs at once, overwritten by the next chunk."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kind = {"size": (rows, vocab), "dtype": dtype, "device": device}
        self._all: dict[int, Tensor] = {}  # by address, which a view of the first rows shares
        self._free: list[Tensor] = []

    def take(self, rows: int) -> Tensor:
        """The first `rows` of a free buffer, (rows, vocab); what it holds is left of an earlier use."""
        if not self._free:
            buffer = torch.empty(**self._kind)
            self._all[buffer.data_ptr()] = buffer
            self._free.append(buffer)
        return self._free.pop()[:rows]

    def release(self, buffer: Tensor) -> None:
        """Give back what `take` gave."""
        self._free.append(self._all[buffer.data_ptr()])

    def release_all(self) -> None:
        """Give back everything: a chunk is done."""
        self._free = list(self._all.values())


@dataclass
class Chunk:
    """Logits of some positions, and what several terms may share of them.

    Shapes: logits (rows, vocab) in float32 or wider, labels (rows,), embeddings (vocab, width) in the precision of
    matrix products.
    Rows that a term does not score may carry any valid label. What (rows, vocab) tensors it hands out are overwritten
    by the next chunk.
    """

    logits: Tensor
    labels: Tensor
    embeddings: Tensor | None
    buffers: Buffers
    teacher: TeacherTarget | None = None
    _probabilities: dict[float, Tensor] = field(default_factory=dict)
    _expected_embeddings: dict[float, Tensor] = field(default_factory=dict)
    _largest_logit: Tensor | None = None
    _teacher_logits: Tensor | None = None

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """softmax(z / T), (rows, vocab), formed once per temperature."""
        if temperature not in self._probabilities:
            result = self.buffers.take(len(self.labels))
            self._probabilities[temperature] = tempered_softmax(self.logits, temperature, result)
        return self._probabilities[temperature]

    def expected_embedding(self, temperature: float = 1.0) -> Tensor:
        """mu = softmax(z / T) E, (rows, width), formed once per temperature."""
        if temperature not in self._expected_embeddings:
            mu = matrix_product(self.probabilities(temperature), self.embeddings)
            self._expected_embeddings[temperature] = mu
        return self._expected_embeddings[temperature]

    def largest_logit(self) -> Tensor:
        """max z, (rows, 1), formed once."""
        if self._largest_logit is None:
            self._largest_logit = self.logits.amax(-1, keepdim=True)
        return self._largest_logit

    def teacher_logits(self) -> Tensor:
        """The teacher's logits over the student's vocabulary, (rows, vocab), formed once."""
        if self._teacher_logits is None:
            self._teacher_logits = self.teacher.logits(self.buffers.take(len(self.labels)))
        return self._teacher_logits

    def give_up_teacher_logits(self) -> Tensor:
        """The teacher's logits in memory that is now the caller's; who asks for them later has them formed again."""
        logits, self._teacher_logits = self.teacher_logits(), None
        return logits

    def log_probabilities(self, columns: Tensor) -> Tensor:
        """log softmax(z) at `columns` (rows, k), taken from the most probable entry: precise where that is near 1."""
        log_top = self.probabilities().amax(-1, keepdim=True).log()  # (rows, 1)
        return self.logits.gather(-1, columns) - self.largest_logit() + log_top  # (rows, k)


class Gradients:
    """What terms add to: dz of the present chunk (rows, vocab), and dE (vocab, width) over all chunks.

    A first addend is kept or written where it will stay; only what is neither product nor sum needs zeros first.
    """

    def __init__(self, buffers: Buffers, rows: int, embeddings: Tensor | None) -> None:
        self.embeddings = embeddings
        self._buffers, self._rows = buffers, rows
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """dz so far, (rows, vocab), to be added to in place."""
        if self._logits is None:
            self._logits = self._buffers.take(self._rows).zero_()
        return self._logits

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """dz += left * right, each (rows, vocab) or (rows, 1)."""
        if self._logits is None:
            self._logits = torch.mul(left, right, out=self._buffers.take(self._rows))
        else:
            self._logits.addcmul_(left, right)

    def add_buffer(self, addend: Tensor) -> None:
        """dz += addend, a buffer (rows, vocab) that the caller has no more use for."""
        if self._logits is None:
            self._logits = addend
        else:
            self._logits += addend
            self._buffers.release(addend)


def tempered_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """softmax(z / T) in the memory of `out`, which may be that of `logits`."""
    return torch.softmax(logits if temperature == 1.0 else torch.div(logits, temperature, out=out), -1, out=out)


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., width) divided by their norms, and the norms (..., 1): infinite where there is no direction."""
    norm = vectors.norm(dim=-1, keepdim=True)
    norm = norm.masked_fill(norm < SMALLEST_NORM, torch.inf)
    return vectors / norm, norm
