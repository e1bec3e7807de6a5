"""Kernels of ``functional.interpolate_norm``, one pass forward and one backward.

Arguments and results are those of ``interpolate_norm_forward`` and ``interpolate_norm_backward``. Each program keeps a
row at a time in registers. For the gradient of alpha it sums a fixed set of rows, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from antransformer.kernels import device_of, row_sizes

EPS = tl.constexpr(1e-12)  # functional.NORM_EPS
PROGRAMS = 1024  # in the backward pass: several for each multiprocessor of a GPU


def forward(x: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Result (..., d), and 1 / ||y|| (..., 1), or 0 for a zero vector."""
    x, y, width = x.contiguous(), y.contiguous(), x.shape[-1]
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    z = torch.empty_like(x)
    if rows := inverse.numel():
        with device_of(x):
            _forward[(rows,)](x, y, _expand(alpha, width), z, inverse, width, **row_sizes(width))
    return z, inverse


def backward(
    grad_output: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and alpha, each in the dtype of its tensor."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, *gradients_of_y_and_alpha(grad_output, x, y, alpha, inverse, grad_x)


def gradients_of_y_and_alpha(
    grad_output: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor, grad_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and alpha, each in the dtype of its tensor; writes the gradient of x to ``grad_x``, if given."""
    grad_output, x, y, width = grad_output.contiguous(), x.contiguous(), y.contiguous(), x.shape[-1]
    grad_y = torch.empty_like(y)
    rows = inverse.numel()
    programs = min(rows, PROGRAMS)
    partial_sums = inverse.new_empty((programs, width))  # of the gradient of alpha, one row for each program
    if rows:
        tensors = grad_output, x, y, _expand(alpha, width), inverse, grad_x, grad_y, partial_sums
        with device_of(x):
            _backward[(programs,)](*tensors, rows, width, programs, **row_sizes(width))
    return grad_y, partial_sums.sum(0).sum_to_size(alpha.shape).to(alpha.dtype)


def _expand(alpha: Tensor, width: int) -> Tensor:
    return alpha.expand(width).contiguous()


@triton.jit
def _forward(x, y, alpha, z, inverse, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = row * width + column
    precision = inverse.dtype.element_ty
    y_row = tl.load(y + offset, mask=inside, other=0.0).to(precision)
    x_row = tl.load(x + offset, mask=inside, other=0.0).to(precision)
    alpha_row = tl.load(alpha + column, mask=inside, other=0.0).to(precision)
    length = tl.sqrt(tl.sum(y_row * y_row, 0))
    inverse_row = tl.where(length <= EPS, 0.0, 1 / tl.maximum(length, EPS))
    nu = 1 / tl.sqrt(alpha_row * alpha_row + (1 - alpha_row) * (1 - alpha_row))
    result = x_row * ((1 - alpha_row) * nu) + y_row * inverse_row * (alpha_row * nu)
    tl.store(z + offset, result.to(z.dtype.element_ty), mask=inside)
    tl.store(inverse + row, inverse_row)


@triton.jit
def _backward(
    grad_output, x, y, alpha, inverse, grad_x, grad_y, partial_sums, rows, width, programs, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    precision = inverse.dtype.element_ty
    alpha_row = tl.load(alpha + column, mask=inside, other=0.0).to(precision)
    nu = 1 / tl.sqrt(alpha_row * alpha_row + (1 - alpha_row) * (1 - alpha_row))
    x_weight, y_weight = (1 - alpha_row) * nu, alpha_row * nu
    grad_alpha = tl.zeros([BLOCK], dtype=precision)
    for row in range(first, rows, programs):
        offset = row * width + column
        grad = tl.load(grad_output + offset, mask=inside, other=0.0).to(precision)
        x_row = tl.load(x + offset, mask=inside, other=0.0).to(precision)
        inverse_row = tl.load(inverse + row)
        unit = tl.load(y + offset, mask=inside, other=0.0).to(precision) * inverse_row
        product = grad * unit
        if grad_x is not None:
            tl.store(grad_x + offset, (grad * x_weight).to(grad_x.dtype.element_ty), mask=inside)
        # The gradient through y / ||y|| has no component along y.
        grad_y_row = (grad * y_weight - unit * tl.sum(product * y_weight, 0)) * inverse_row
        tl.store(grad_y + offset, grad_y_row.to(grad_y.dtype.element_ty), mask=inside)
        grad_alpha += (1 - alpha_row) * product - alpha_row * grad * x_row
    # nu^3: see the derivatives of the weights in functional.interpolate_norm_backward.
    tl.store(partial_sums + first * width + column, grad_alpha * nu * nu * nu, mask=inside)
