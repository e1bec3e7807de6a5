"""``functional.interpolate_norm`` in one pass forward and one backward; arguments and results as those of its twins.

A program has a row in registers. Of the gradient of alpha each program sums the rows that it does, always the same
ones: the result does not depend on which of them is done first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from antransformer.kernels import row_sizes

EPS = tl.constexpr(1e-12)  # functional.NORM_EPS
PROGRAMS = 1024  # of the backward pass: several for each processor of a GPU


def forward(x: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and 1 / ||y|| (..., 1)."""
    x, y, width = x.contiguous(), y.contiguous(), x.shape[-1]
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    z = torch.empty_like(x)
    if rows := inverse.numel():
        _forward[(rows,)](x, y, _wide(alpha, width), z, inverse, width, **row_sizes(width))
    return z, inverse


def backward(gradient: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and alpha, each in its dtype."""
    gradient, x, y, width = gradient.contiguous(), x.contiguous(), y.contiguous(), x.shape[-1]
    for_x, for_y = torch.empty_like(x), torch.empty_like(y)
    rows = inverse.numel()
    programs = min(rows, PROGRAMS)
    parts = inverse.new_empty((programs, width))
    if rows:
        tensors = gradient, x, y, _wide(alpha, width), inverse, for_x, for_y, parts
        _backward[(programs,)](*tensors, rows, width, programs, **row_sizes(width))
    return for_x, for_y, parts.sum(0).sum_to_size(alpha.shape).to(alpha.dtype)


def _wide(alpha: Tensor, width: int) -> Tensor:
    return alpha.expand(width).contiguous()


@triton.jit
def _forward(x, y, alpha, z, inverse, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    precision = inverse.dtype.element_ty
    y_row = tl.load(y + place, mask=inside, other=0.0).to(precision)
    x_row = tl.load(x + place, mask=inside, other=0.0).to(precision)
    alpha_row = tl.load(alpha + column, mask=inside, other=0.0).to(precision)
    one_over = 1 / tl.maximum(tl.sqrt(tl.sum(y_row * y_row, 0)), EPS)
    nu = 1 / tl.sqrt(alpha_row * alpha_row + (1 - alpha_row) * (1 - alpha_row))
    result = x_row * ((1 - alpha_row) * nu) + y_row * one_over * (alpha_row * nu)
    tl.store(z + place, result.to(z.dtype.element_ty), mask=inside)
    tl.store(inverse + row, one_over)


@triton.jit
def _backward(gradient, x, y, alpha, inverse, for_x, for_y, parts, rows, width, programs, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    precision = inverse.dtype.element_ty
    alpha_row = tl.load(alpha + column, mask=inside, other=0.0).to(precision)
    nu = 1 / tl.sqrt(alpha_row * alpha_row + (1 - alpha_row) * (1 - alpha_row))
    keep, move = (1 - alpha_row) * nu, alpha_row * nu
    for_alpha = tl.zeros([BLOCK], dtype=precision)
    for row in range(first, rows, programs):
        place = row * width + column
        slope = tl.load(gradient + place, mask=inside, other=0.0).to(precision)
        x_row = tl.load(x + place, mask=inside, other=0.0).to(precision)
        one_over = tl.load(inverse + row)
        unit = tl.load(y + place, mask=inside, other=0.0).to(precision) * one_over
        along = slope * unit
        tl.store(for_x + place, (slope * keep).to(for_x.dtype.element_ty), mask=inside)
        slope_y = (slope * move - unit * tl.sum(along * move, 0)) * one_over
        tl.store(for_y + place, slope_y.to(for_y.dtype.element_ty), mask=inside)
        for_alpha += (1 - alpha_row) * along - alpha_row * slope * x_row
    tl.store(parts + first * width + column, for_alpha * nu * nu * nu, mask=inside)
