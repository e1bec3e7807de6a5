"""``bounds.project_`` on the rows of a matrix in one pass: each is read once, and written only where it is too long."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from antransformer.kernels import row_sizes


def project_rows_(weight: Tensor, strict: bool) -> None:
    """Put every row of a contiguous matrix into the unit ball, or where strict onto the sphere, in place."""
    rows, width = weight.shape
    precision = {torch.float64: tl.float64}.get(weight.dtype, tl.float32)
    if rows:
        _project[(rows,)](weight, width, LEAST=0.0 if strict else 1.0, PRECISION=precision, **row_sizes(width))


@triton.jit
def _project(weight, width, LEAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = weight + tl.program_id(0).to(tl.int64) * width + column
    row = tl.load(place, mask=inside, other=0.0).to(PRECISION)
    length = tl.sqrt(tl.sum(row * row, 0))
    if length > LEAST:  # a zero row stays zero
        tl.store(place, (row / length).to(weight.dtype.element_ty), mask=inside)
