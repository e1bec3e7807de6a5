import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from antransformer import factors
from helpers.messages import mentions


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_sphere(n, d, seed=0):
    return F.normalize(gaussian((n, d), seed), dim=-1)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(512, 64), (512, 512), (256, 1024), (1024, 256)])
def test_linear_gives_a_random_map_unit_norm(fan_in, fan_out):
    y = on_sphere(2000, fan_in) @ on_sphere(fan_out, fan_in, seed=1).T * factors.linear(fan_in, fan_out)
    assert y.norm(dim=-1).square().mean().item() == pytest.approx(1, rel=0.01)


def test_numbers_of_numpy_are_accepted():
    assert factors.linear(np.int64(12), 3) == 2 and factors.attention(np.int64(9)) == 3
    assert factors.residual(np.float32(0.5)) == pytest.approx(math.sqrt(2))


@given(st.floats(-3, 3))
def test_residual_is_the_inverse_norm_of_an_interpolation(alpha):
    expected = 1 / math.sqrt((1 - alpha) ** 2 + alpha**2)
    assert factors.residual(alpha) == pytest.approx(expected, rel=1e-12)
    assert factors.residual(torch.tensor([alpha], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_residual_is_elementwise_and_keeps_dtype_and_gradient():
    alpha = torch.tensor([0.0, 0.05, 0.5, 1.0], requires_grad=True)
    nu = factors.residual(alpha)
    assert nu.dtype == torch.float32 and nu.shape == (4,)
    torch.testing.assert_close(nu.detach(), torch.tensor([1, 1 / math.sqrt(0.905), math.sqrt(2), 1]))
    nu.sum().backward()
    assert alpha.grad is not None and alpha.grad[0] > 0 > alpha.grad[3]


@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.5])
def test_residual_keeps_the_norm_of_independent_vectors(alpha):
    x, y = on_sphere(2000, 512), on_sphere(2000, 512, seed=1)
    z = (x + alpha * (y - x)) * factors.residual(alpha)
    assert z.norm(dim=-1).mean().item() == pytest.approx(1, rel=0.005)


def test_sum_residual_keeps_the_norm_of_independent_vectors():
    x, y = on_sphere(2000, 512), on_sphere(2000, 512, seed=1)
    assert ((x + y) * factors.sum_residual()).norm(dim=-1).mean().item() == pytest.approx(1, rel=0.005)


# Thirty-digit adaptive quadrature with mpmath 1.3: 1 / sqrt(E f(z)^2).
@pytest.mark.parametrize(
    ("fn", "std", "expected"),
    [
        (F.silu, 0.5, 3.72034920749916958688),
        (F.silu, 1, 1.67653247033109115860),
        (F.silu, 3, 0.48510492392766601427),
        (F.silu, 10, 0.14159538038293808762),
        (torch.square, 1.0, 1 / math.sqrt(3)),
        (lambda z: z, 2.0, 0.5),
        (torch.sin, 1.5, 1 / math.sqrt((1 - math.exp(-4.5)) / 2)),
        (torch.exp, 1.0, math.exp(-1)),
        (lambda z: torch.full_like(z, 0.25), 1.0, 4.0),
    ],
)
def test_activation_is_exact_for_smooth_functions(fn, std, expected):
    assert factors.activation(fn, std) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fn", [F.silu, F.gelu, torch.tanh, F.mish, F.softplus, torch.sigmoid, F.elu])
@pytest.mark.parametrize("std", [0.02, 0.5, 1.0, 4.0, 20.0])
def test_activation_agrees_with_a_finer_rule(fn, std):
    # Composite Simpson on 200,001 nodes over another interval, from the definition.
    z = torch.linspace(-15, 15, 200_001, dtype=torch.float64)
    values = fn(z * std).square() * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    weights = torch.full_like(z, 2.0)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    moment = (weights * values).sum() * 30 / 200_000 / 3
    assert factors.activation(fn, std) == pytest.approx(moment.rsqrt().item(), rel=1e-6)


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 7.0])
def test_activation_of_kinked_functions(std):
    assert factors.activation(F.relu, std) == pytest.approx(math.sqrt(2) / std, rel=1e-9)
    leaky = 1 / (std * math.sqrt((1 + 0.01**2) / 2))
    assert factors.activation(F.leaky_relu, std) == pytest.approx(leaky, rel=1e-3)


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_activation_normalizes_a_gated_product(std):
    u, z = gaussian((500, 4096)) / 64, gaussian((500, 4096), seed=1) * std
    hidden = u * F.silu(z) * factors.activation(F.silu, std)
    assert hidden.norm(dim=-1).mean().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_attention_restores_the_norm_of_an_average(rows):
    mean = on_sphere(1000 * rows, 256).view(1000, rows, 256).mean(1) * factors.attention(rows)
    assert mean.norm(dim=-1).mean().item() == pytest.approx(1, rel=0.01)
    assert factors.attention(torch.tensor([rows])).item() == pytest.approx(math.sqrt(rows))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: factors.linear(0, 4), ("fan_in", 0)),
        (lambda: factors.linear(4, -1), ("fan_out", -1)),
        (lambda: factors.linear(4.0, 4), ("fan_in", 4.0)),
        (lambda: factors.residual(float("nan")), ("alpha", "nan")),
        (lambda: factors.residual(float("inf")), ("alpha", "inf")),
        (lambda: factors.residual(1j), ("alpha", "1j")),
        (lambda: factors.residual(torch.tensor([1j])), ("alpha", torch.complex64)),
        (lambda: factors.residual(torch.tensor([1])), ("alpha", torch.int64)),
        (lambda: factors.activation(torch.zeros_like), ("activation",)),
        (lambda: factors.activation(F.silu, std=0), ("std", 0)),
        (lambda: factors.activation(lambda z: z / 0), ("activation",)),
        (lambda: factors.activation(torch.sum), ("activation",)),
        (lambda: factors.attention(0), ("rows", 0)),
        (lambda: factors.attention(torch.tensor([1, 0])), ("rows", 1)),
    ],
)
def test_bad_arguments_are_named_with_their_values(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    assert mentions(error.value, *parts)
