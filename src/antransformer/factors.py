"""The normalization factors of the approximately normalized transformer, as pure functions of numbers.

A map g whose output norm concentrates around sqrt(E ||g(x)||^2) for x on the unit sphere is brought back to the sphere
by the constant nu = 1 / sqrt(E ||g(x)||^2): no statistic of the input is needed, because in high dimensions the norm
hardly depends on the input (arXiv:2505.22014, Theorem 1 and section 4.2). Every factor below is such a nu.

Factors of constants are Python floats, so that they fold into neighbouring operations and never promote a dtype; where
the argument is a learnable tensor (``residual``, ``attention``) the factor is a tensor of the same shape.
"""

import math
import numbers
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor


def linear(fan_in: int, fan_out: int) -> float:
    """Factor of ``W x``: sqrt(fan_in / fan_out).

    Assumes x uniform on the unit sphere in R^fan_in and rows of W of unit norm; then each output has variance
    1 / fan_in, and E ||W x||^2 = fan_out / fan_in. Source: arXiv:2505.22014, section 4.2.

    Raises:
        ValueError: a fan is not a positive integer.
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

    Assumes x and y independent on the unit sphere, so that the cross term vanishes in expectation and
    E ||.||^2 = (1 - alpha)^2 + alpha^2 = 1 - 2 alpha + 2 alpha^2. With a vector alpha the same holds for each
    coordinate. It lies between 1 (alpha = 0 or 1) and sqrt(2) (alpha = 1/2) for an interpolation, and is defined for
    every real alpha. Source: arXiv:2505.22014, section 4.2 (the form with the square root; the paper also prints
    1 - 2 alpha + 2 alpha^2, which is 1 / nu^2).

    Args:
        alpha: a number, or a real floating-point tensor of any shape; the result has its type, shape and dtype.

    Raises:
        ValueError: alpha is a number that is not real and finite, or a tensor without a real floating-point dtype
            (its values are not looked at).
    """
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ValueError(f"alpha must be a real floating-point tensor, got {alpha.dtype}")
        return torch.rsqrt(alpha.square() + (1 - alpha).square())
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite real number, got {alpha!r}")
    return 1 / math.hypot(alpha, 1 - alpha)


def sum_residual() -> float:
    """Factor of the plain residual ``x + y``: 1 / sqrt(2).

    Assumes x and y independent on the unit sphere: E ||x + y||^2 = 2. Source: arXiv:2505.22014, section 4.2.
    """
    return 1 / math.sqrt(2)


def activation(fn: Callable[[Tensor], Tensor], std: float = 1.0) -> float:
    """Factor of an elementwise activation: 1 / sqrt(E fn(z)^2) with z ~ N(0, std^2).

    Assumes pre-activations that are Gaussian, which coordinates of a random point on a high-dimensional sphere are in
    the limit. The factor is relative to inputs of norm sqrt(width): n coordinates of variance std^2 leave with
    sum fn(z_i)^2 = n / nu^2. SiLU: 3.72035 at std 0.5, 1.67653 at std 1; ReLU: sqrt(2) / std.
    Source: arXiv:2505.22014, section 4.2 and appendix (nu_act, there by Monte Carlo, about 3.74).

    The expectation is taken with the trapezoid rule over +-38 standard deviations, which converges geometrically for a
    smooth integrand with Gaussian tails and, unlike Gauss-Hermite nodes, stays accurate where ``fn`` varies on a scale
    much smaller than ``std``: within 1e-6 at std up to 50, for smooth activations and for kinked ones (ELU, ReLU6).

    Args:
        fn: maps a float64 tensor of shape (n,) to one of the same shape, elementwise.
        std: standard deviation of the pre-activations, positive.

    Raises:
        ValueError: std is not positive and finite; fn is zero, or not finite, on (almost) all inputs, or not
            elementwise.
    """
    if isinstance(std, bool) or not isinstance(std, numbers.Real) or not math.isfinite(std) or std <= 0:
        raise ValueError(f"std must be a positive finite number, got {std!r}")
    z = torch.linspace(-38, 38, 2**16 + 1, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2)
    with torch.no_grad():
        value = fn(z * std)
    if not isinstance(value, Tensor) or value.shape != z.shape:
        raise ValueError("the activation must map a tensor elementwise to one of the same shape")
    # Far out the density underflows; a function that overflows only there still has its expectation.
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
    """Factor of causal attention row r, which averages r value vectors: sqrt(r).

    Assumes dense (uniform) attention over r independent unit vectors: E ||.||^2 = 1 / r. Trained attention is sparse,
    so the models do not use it; it is the upper end of what an attention row may need. Source: arXiv:2505.22014,
    derived there and left unused.

    Args:
        rows: the number of visible positions r >= 1, or an integer or floating tensor of them (the result is float).

    Raises:
        ValueError: a row number below 1.
    """
    if isinstance(rows, Tensor):
        if rows.is_complex() or rows.dtype == torch.bool or bool((rows < 1).any()):
            raise ValueError("rows must be real numbers of at least 1")
        return rows.sqrt()
    if isinstance(rows, bool) or not isinstance(rows, numbers.Integral) or rows < 1:
        raise ValueError(f"rows must be a positive integer, got {rows!r}")
    return math.sqrt(rows)
