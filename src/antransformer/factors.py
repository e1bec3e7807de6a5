"""Normalization factors of the approximately normalized transformer, as pure functions of numbers.

Take a map g and an input x on the unit sphere. In high dimensions ||g(x)|| hardly depends on x: it concentrates around
sqrt(E ||g(x)||^2). So the constant nu = 1 / sqrt(E ||g(x)||^2) brings the output back to about unit norm, without a
statistic of the input (arXiv:2505.22014, Theorem 1 and section 4.2). Each function below returns such a nu.

Constant factors are Python floats: they fold into neighbouring operations and never promote a dtype. ``residual`` and
``attention`` also accept tensors and then return a tensor of the same shape.
"""

import math
import numbers
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor


def linear(fan_in: int, fan_out: int) -> float:
    """Factor of the linear map ``W x``: sqrt(fan_in / fan_out).

    Assumes x uniform on the unit sphere in R^fan_in and rows of W with unit norm. Then each output has variance
    1 / fan_in, and E ||W x||^2 = fan_out / fan_in. Source: arXiv:2505.22014, section 4.2.

    Raises:
        ValueError: fan_in or fan_out is not a positive integer.
    """
    for name, fan in (("fan_in", fan_in), ("fan_out", fan_out)):
        if isinstance(fan, bool) or not isinstance(fan, numbers.Integral) or fan < 1:
            raise ValueError(f"{name} must be a positive integer, got {fan!r}")
    return math.sqrt(fan_in / fan_out)


@overload
def residual(alpha: float) -> float: ...
@overload
def residual(alpha: Tensor) -> Tensor: ...
def residual(alpha: float | Tensor) -> float | Tensor:
    """Factor of the interpolation ``x + alpha (y - x)``: 1 / sqrt(alpha^2 + (1 - alpha)^2), elementwise on tensors.

    Assumes x and y independent on the unit sphere. The cross term then vanishes in expectation, and
    E ||.||^2 = (1 - alpha)^2 + alpha^2. With a vector alpha the same holds for each coordinate. The factor is 1 at
    alpha = 0 and 1, and at most sqrt(2), at alpha = 1/2; it is defined for every real alpha.
    Source: arXiv:2505.22014, section 4.2, in the form with the square root. The paper also prints
    1 - 2 alpha + 2 alpha^2, which is 1 / nu^2.

    Args:
        alpha: number, or real floating-point tensor of any shape. The result has the same type, shape and dtype.

    Raises:
        ValueError: alpha is a number but not real and finite, or a tensor without a real floating-point dtype. Values
            of a tensor are not checked.
    """
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ValueError(f"alpha must be a real floating-point tensor, got {alpha.dtype}")
        return torch.rsqrt(alpha.square() + (1 - alpha).square())
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite real number, got {alpha!r}")
    return 1 / math.hypot(alpha, 1 - alpha)


def sum_residual() -> float:
    """Factor of the plain residual sum ``x + y``: 1 / sqrt(2).

    Assumes x and y independent on the unit sphere: E ||x + y||^2 = 2. Source: arXiv:2505.22014, section 4.2.
    """
    return 1 / math.sqrt(2)


def activation(fn: Callable[[Tensor], Tensor], std: float = 1.0) -> float:
    """Factor of an elementwise activation: 1 / sqrt(E fn(z)^2) with z ~ N(0, std^2).

    Assumes Gaussian pre-activations. Coordinates of a random point on a high-dimensional sphere are Gaussian in the
    limit. The factor is per coordinate: n inputs of variance std^2 give outputs with sum fn(z_i)^2 = n / nu^2.
    SiLU: 3.72035 at std 0.5, 1.67653 at std 1; ReLU: sqrt(2) / std.
    Source: arXiv:2505.22014, section 4.2 and appendix (nu_act, about 3.74 by Monte Carlo).

    Args:
        fn: elementwise function from a float64 tensor (n,) to a tensor (n,).
        std: standard deviation of the pre-activations, positive.

    Raises:
        ValueError: std is not positive and finite; fn changes the shape, is zero on (almost) all inputs, or has an
            infinite second moment.
    """
    if isinstance(std, bool) or not isinstance(std, numbers.Real) or not math.isfinite(std) or std <= 0:
        raise ValueError(f"std must be a positive finite number, got {std!r}")
    # The trapezoid rule over +-38 standard deviations converges geometrically for smooth integrands with Gaussian
    # tails. Unlike Gauss-Hermite nodes it stays accurate where fn varies on a scale much smaller than std: within 1e-6
    # at std up to 50, also for activations with a kink (ELU, ReLU6).
    z = torch.linspace(-38, 38, 2**16 + 1, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2)
    with torch.no_grad():
        value = fn(z * std)
    if not isinstance(value, Tensor) or value.shape != z.shape:
        raise ValueError("the activation must map a tensor elementwise to one of the same shape")
    # Far from 0 the density underflows. A function that overflows only there still has a finite expectation.
    second_moment = torch.where(density > 0, density * value.square(), 0).sum() / density.sum()
    if not math.isfinite(second_moment):
        raise ValueError("the activation is not finite on Gaussian inputs, so it has no factor")
    if second_moment == 0:
        raise ValueError("the activation is zero everywhere, so no factor can bring its output to unit norm")
    return float(second_moment.rsqrt())


@overload
def attention(rows: int) -> float: ...
@overload
def attention(rows: Tensor) -> Tensor: ...
def attention(rows: int | Tensor) -> float | Tensor:
    """Factor of a causal attention row that averages r value vectors: sqrt(r).

    Assumes uniform attention over r independent unit vectors: E ||.||^2 = 1 / r. Trained attention is sparse, so the
    models do not use this factor; it is an upper limit. Source: arXiv:2505.22014, which derives it and leaves it
    unused.

    Args:
        rows: number of visible positions r, at least 1, or a real tensor of such numbers. The result is float.

    Raises:
        ValueError: not a positive integer, or a tensor with numbers below 1 or that are not real.
    """
    if isinstance(rows, Tensor):
        if rows.is_complex() or rows.dtype == torch.bool or bool((rows < 1).any()):
            raise ValueError("rows must be real numbers of at least 1")
        return rows.sqrt()
    if isinstance(rows, bool) or not isinstance(rows, numbers.Integral) or rows < 1:
        raise ValueError(f"rows must be a positive integer, got {rows!r}")
    return math.sqrt(rows)
