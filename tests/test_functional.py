import math

import pytest
import torch
import torch.nn.functional as F

from antransformer import factors, functional
from antransformer.benchmarks.timing import peak_memory

NOWHERE = functional.AttentionContext(
    functional.rotary_tables(torch.arange(0), 0, 1.0)
)  # attention alone needs no positions


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def mean_norm(x):
    return x.norm(dim=-1).mean().item()


def test_norm_agrees_with_torch_forward_and_backward():
    x = random(5, 7, 64).requires_grad_()
    torch.testing.assert_close(functional.normalize(x), F.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(functional.normalize, (random(3, 8, seed=1).requires_grad_(),))


def test_norm_of_half_precision_is_computed_in_float32():
    x = torch.full((1, 4096), 1 / 64, dtype=torch.bfloat16) * 300
    y = functional.normalize(x)
    assert y.dtype == torch.bfloat16
    assert y.float().norm().item() == pytest.approx(1, rel=4e-3)
    assert torch.equal(functional.normalize(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_norm_scale_of_the_gradient():
    # The Jacobian at a unit vector projects onto its tangent space: (d - 1) / d of a random gradient's square stays.
    x, gradient = unit(2000, 64).requires_grad_(), unit(2000, 64, seed=1)
    functional.normalize(x).backward(gradient)
    assert x.grad.square().sum(-1).mean().item() == pytest.approx(63 / 64, rel=0.01)


def test_linear_scale_forward_and_backward():
    x, weight = unit(1000, 256).requires_grad_(), unit(1024, 256, seed=1)
    y = functional.linear(x, weight, 0.5)
    assert mean_norm(y) == pytest.approx(1, rel=0.01)  # sqrt(256 / 1024) = 1/2
    y.backward(unit(1000, 1024, seed=2))
    # W^T g adds up fan_out independent unit rows: its norm is that of g, here times the factor.
    assert mean_norm(x.grad) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_linear_is_the_product_with_a_scaled_weight(shape):
    x, weight, bias = random(*shape).requires_grad_(), random(7, 5, seed=1).requires_grad_(), random(7, seed=2)
    torch.testing.assert_close(functional.linear(x, weight, 0.3, bias), F.linear(x, 0.3 * weight, bias))
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    assert torch.autograd.gradcheck(lambda *given: functional.linear(*given, 0.3), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: functional.linear(*given, 0.3), inputs)


def test_linear_keeps_no_scaled_weight_for_the_backward_pass():
    kept = []
    x, weight = unit(10, 64), unit(32, 64, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        functional.linear(x, weight, 0.3)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_gated_activation_scale_of_the_gradient(std):
    # d c / d u = nu SiLU(z), of second moment 1 by the choice of nu: a random gradient keeps its norm.
    u, z = unit(500, 4096).requires_grad_(), random(500, 4096, seed=1) * std
    (u * F.silu(z) * factors.activation(F.silu, std)).backward(unit(500, 4096, seed=2))
    assert mean_norm(u.grad) == pytest.approx(1, rel=0.01)


def test_linear_with_a_vector_scales_each_output():
    x, weight, scale = random(3, 5, 8), random(6, 8, seed=1), random(6, seed=2).requires_grad_()
    y = functional.linear(x, weight, scale)
    torch.testing.assert_close(y, (x @ weight.T) * scale)
    gradient = random(3, 5, 6, seed=3)
    y.backward(gradient)
    torch.testing.assert_close(scale.grad, (gradient * (x @ weight.T)).sum((0, 1)))


@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.5])
def test_interpolate_scale_forward_and_backward(alpha):
    x, y = unit(1000, 256).requires_grad_(), unit(1000, 256, seed=1).requires_grad_()
    nu = 1 / math.hypot(alpha, 1 - alpha)
    z = functional.interpolate(x, y, torch.full((256,), alpha, dtype=torch.float64))
    torch.testing.assert_close(z, (x + alpha * (y - x)) * nu)
    assert mean_norm(z) == pytest.approx(1, rel=0.01)
    z.backward(unit(1000, 256, seed=2))
    assert mean_norm(x.grad) == pytest.approx((1 - alpha) * nu)
    assert mean_norm(y.grad) == pytest.approx(alpha * nu)


def test_interpolations_check_by_finite_differences():
    inputs = (random(2, 6), random(2, 6, seed=1), random(6, seed=2) * 0.1 + 0.2)
    arguments = tuple(value.requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(functional.interpolate, arguments)
    assert torch.autograd.gradcheck(functional.interpolate_exact, arguments)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (2, 5, 3, 64)])
@pytest.mark.parametrize("wide", [True, False])
def test_interpolate_norm_is_norm_and_interpolate_both_ways(shape, dtype, tolerance, wide):
    alpha = 0.3 * random(shape[-1] if wide else 1, seed=3)
    inputs = [value.to(dtype).requires_grad_() for value in (unit(*shape), 5 * random(*shape, seed=1), alpha)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    x, y, alpha = exact
    gradient = random(*shape, seed=2).to(dtype)
    z, expected = functional.interpolate_norm(*inputs), functional.interpolate(x, functional.normalize(y), alpha)
    found, wanted = torch.autograd.grad(z, inputs, gradient), torch.autograd.grad(expected, exact, gradient.double())
    for one, other in zip((z, *found), (expected, *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_interpolate_norm_has_first_derivatives_and_says_that_it_has_no_second():
    inputs = random(2, 6).requires_grad_(), random(2, 6, seed=1).requires_grad_(), random(6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(functional.interpolate_norm, inputs)
    assert functional.interpolate_norm(inputs[0], torch.zeros(2, 6), inputs[2]).isfinite().all()
    (slope,) = torch.autograd.grad(functional.interpolate_norm(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_the_stream_keeps_its_dtype_and_little_is_kept_for_the_backward_pass():
    x, y, alpha = random(50, 64).float().requires_grad_(), random(50, 64, seed=1).bfloat16(), random(64, seed=2).float()
    y.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda it: kept.append(it) or it, lambda it: it):
        z = functional.interpolate_norm(x, y, alpha)
    assert z.dtype == torch.float32
    assert sum(it.nbytes for it in kept) == x.nbytes + y.nbytes + alpha.nbytes + 50 * 4
    z.sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16)


def test_exact_interpolation_has_unit_norm():
    z = functional.interpolate_exact(unit(100, 32), unit(100, 32, seed=1), torch.linspace(0.01, 0.9, 32).double())
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("rotated", [0, 8, 16])
def test_rotary_agrees_with_complex_multiplication(rotated):
    x = random(2, 10, 3, 16, dtype=torch.float32)
    rotary = functional.rotary_tables(torch.arange(10), rotated, 10_000.0)
    y = functional.rotate(x, rotary)
    half = rotated // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / max(rotated, 1))
    turn = torch.polar(torch.ones(10, half).double(), torch.arange(10).double()[:, None] * frequency)[:, None, :]
    paired = torch.complex(x[..., :half].double(), x[..., half:rotated].double()) * turn
    expected = torch.cat([paired.real, paired.imag, x[..., rotated:].double()], dim=-1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_only_and_norms_stay():
    q, k = random(16), random(16, seed=1)
    rotary = functional.rotary_tables(torch.arange(30), 16, 100.0)
    q_all = functional.rotate(q.expand(1, 30, 1, 16), rotary)[0, :, 0]
    k_all = functional.rotate(k.expand(1, 30, 1, 16), rotary)[0, :, 0]
    scores = q_all @ k_all.T
    for distance in (0, 3, 20):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)
    assert abs(scores[20, 0] - scores[3, 0]) > 0.01
    torch.testing.assert_close(q_all.norm(dim=-1), q.norm().expand(30), rtol=1e-6, atol=0)


def reference_attention(q, k, v, scale):
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        scores = torch.einsum("bnh,bsnh->bns", q[:, t], k[:, : t + 1]) * scale
        out[:, t] = torch.einsum("bns,bsnh->bnh", scores.softmax(-1), v[:, : t + 1])
    return out.flatten(2)


def test_causal_attention_agrees_with_a_loop_forward_and_backward():
    q, k, v = (random(2, 9, 3, 8, seed=seed).requires_grad_() for seed in range(3))
    ours, theirs = functional.causal_attention(q, k, v, NOWHERE, scale=0.7), reference_attention(q, k, v, 0.7)
    torch.testing.assert_close(ours, theirs)
    gradient = random(2, 9, 24, seed=4)
    grads = torch.autograd.grad(ours, (q, k, v), gradient)
    for mine, expected in zip(grads, torch.autograd.grad(theirs, (q, k, v), gradient), strict=True):
        torch.testing.assert_close(mine, expected)


def test_uniform_attention_shrinks_by_the_attention_factor():
    v = unit(64, 50, 1, 128)
    y = functional.causal_attention(torch.zeros_like(v), torch.zeros_like(v), v, NOWHERE)
    scaled = y * factors.attention(torch.arange(1, 51)).unsqueeze(-1)
    torch.testing.assert_close(scaled.norm(dim=-1).mean(0), torch.ones(50, dtype=torch.float64), rtol=0.05, atol=0)


def test_split_heads_keeps_the_rows_of_a_head_together():
    # Rows 0-11 of the fused weight make head 0 (q, k, v of width 4), rows 12-23 head 1.
    q, k, v = functional.split_heads(torch.arange(24.0).view(1, 1, 24), 4)
    assert q[0, 0].tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert k[0, 0, 0].tolist() == [4, 5, 6, 7]
    assert v[0, 0, 1].tolist() == [20, 21, 22, 23]


def twin(hidden, weight, targets):
    """The loss from whole logits, in float64."""
    return F.cross_entropy((hidden.double() @ weight.double().T).flatten(0, 1), targets.flatten())


def with_gradients(loss, hidden, weight, targets, share=0.37):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, targets)
    (value * share).backward()
    return value.detach(), hidden.grad, weight.grad


# Tokens around the size of a chunk, and sizes that no kernel likes.
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 127), (2, 64), (3, 43), (5, 77)])
@pytest.mark.parametrize(("width", "vocabulary"), [(1, 2), (13, 101), (64, 1000)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_cross_entropy_is_that_of_whole_logits(batch, tokens, width, vocabulary, dtype, tolerance):
    hidden = (random(batch, tokens, width) * 2).to(dtype)
    weight = (random(vocabulary, width, seed=1) / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(2))
    torch.full((10 * vocabulary * 128,), torch.nan)  # what is freed is found again, and must not be read
    found = with_gradients(functional.cross_entropy, hidden, weight, targets)
    expected = with_gradients(twin, hidden.double(), weight.double(), targets)
    assert [part.dtype for part in found] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())
    with torch.no_grad():
        assert torch.equal(functional.cross_entropy(hidden, weight, targets), found[0])


def test_cross_entropy_passes_the_checks_of_operators():
    hidden, weight = random(2, 70, 5).requires_grad_(), random(7, 5, seed=1).requires_grad_()
    targets = torch.randint(7, (2, 70), generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(functional.cross_entropy, (hidden, weight, targets))
    torch.library.opcheck(functional._cross_entropy, (hidden.flatten(0, 1), weight, targets.flatten(), True))
    loss = functional.cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="create_graph") as error:
        torch.autograd.grad(loss, hidden, create_graph=True)
    assert "cross_entropy" in str(error.value)


def test_cross_entropy_under_autocast_multiplies_in_half_precision():
    hidden, weight = random(2, 100, 16).float(), random(50, 16, seed=1).float()
    targets = torch.randint(50, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(functional.cross_entropy, hidden, weight, targets)
    assert [part.dtype for part in found] == [torch.float32] * 3
    exact = with_gradients(functional.cross_entropy, hidden, weight, targets)
    rounded = with_gradients(functional.cross_entropy, hidden.bfloat16(), weight.bfloat16(), targets)
    assert found[0] != exact[0] and found[0] == rounded[0]
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_logits_are_never_whole_in_memory():
    hidden, weight = random(16, 128, 4).float().requires_grad_(), random(10_000, 4, seed=1).float().requires_grad_()
    targets = torch.zeros(16, 128, dtype=torch.int64)
    whole = 16 * 128 * 10_000 * 4
    peak = peak_memory(lambda: functional.cross_entropy(hidden, weight, targets).backward(), torch.device("cpu"))
    assert peak < whole / 4
