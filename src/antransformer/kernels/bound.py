"""Projection of the rows of a matrix (``bounds.project_``) in one pass; only rows that are too long are written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from antransformer.kernels import row_sizes


def project_rows_(weight: Tensor, strict: bool) -> None:
    """Project every row of a contiguous matrix into the unit ball, or onto the unit sphere if strict, in place."""
    rows, width = weight.shape
    precision = {torch.float64: tl.float64}.get(weight.dtype, tl.float32)
    if rows:
        _project[(rows,)](weight, width, MIN_LENGTH=0.0 if strict else 1.0, PRECISION=precision, **row_sizes(width))


@triton.jit
def _project(weight, width, MIN_LENGTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    # int64, since offsets exceed 2^31 in a large embedding
    pointer = weight + tl.program_id(0).to(tl.int64) * width + column
    row = tl.load(pointer, mask=inside, other=0.0).to(PRECISION)
    length = tl.sqrt(tl.sum(row * row, 0))
    if length > MIN_LENGTH:  # a zero row stays zero
        tl.store(pointer, (row / length).to(weight.dtype.element_ty), mask=inside)
