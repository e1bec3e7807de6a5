import math

import pytest
import torch
import torch.nn.functional as F

from antransformer import factors, functional, kernels
from antransformer.benchmarks.timing import peak_memory
from antransformer.kernels import chunked_cross_entropy
from helpers.messages import mentions

NO_POSITIONS = functional.AttentionContext(functional.rotary_tables(torch.arange(0), 0, 1.0))  # attention uses none


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def mean_norm(x):
    return x.norm(dim=-1).mean().item()


def test_normalize_agrees_with_torch_forward_and_backward():
    x = random(5, 7, 64).requires_grad_()
    torch.testing.assert_close(functional.normalize(x), F.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(functional.normalize, (random(3, 8, seed=1).requires_grad_(),))


def test_normalize_computes_norms_of_half_precision_in_float32():
    x = torch.full((1, 4096), 1 / 64, dtype=torch.bfloat16) * 300
    y = functional.normalize(x)
    assert y.dtype == torch.bfloat16
    assert y.float().norm().item() == pytest.approx(1, rel=4e-3)
    assert torch.equal(functional.normalize(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_normalize_scale_of_the_gradient():
    # The Jacobian at a unit vector projects onto its tangent space, which keeps (d - 1) / d of the square norm.
    x, gradient = unit(2000, 64).requires_grad_(), unit(2000, 64, seed=1)
    functional.normalize(x).backward(gradient)
    assert x.grad.square().sum(-1).mean().item() == pytest.approx(63 / 64, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_vector_stays_zero_with_zero_gradient(dtype):
    """1 / 1e-12 times a gradient gave a norm of infinity, and is infinite in float16."""
    x, y = (torch.zeros(3, 8, dtype=dtype).requires_grad_() for _ in range(2))
    with torch.no_grad():
        x[0] = 1
    for z in (functional.normalize(x), functional.interpolate_norm(y, x, torch.ones(8))):
        assert z[0].norm().item() == pytest.approx(1, rel=1e-2)
        assert torch.equal(z[1:], torch.zeros_like(z[1:]))
        (gradient,) = torch.autograd.grad(z[:, :4].sum(), x)
        assert 0.1 < gradient[0].norm() < 10 and torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))
    assert functional.normalize(torch.full((2, 8), torch.nan)).isnan().all()


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
    assert torch.autograd.gradcheck(lambda *tensors: functional.linear(*tensors, 0.3), inputs)
    assert torch.autograd.gradgradcheck(lambda *tensors: functional.linear(*tensors, 0.3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_reads_no_memory_without_values(dtype):
    x, weight = random(3, 5, 16).to(dtype).requires_grad_(), random(32, 16, seed=1).to(dtype).requires_grad_()
    torch.use_deterministic_algorithms(True)  # fills memory without values with NaN
    try:
        assert torch.empty(1, dtype=dtype).isnan()
        y = functional.linear(x, weight, 3.0)
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (y, x.grad, weight.grad))


def test_linear_saves_no_scaled_weight_for_backward():
    saved = []
    x, weight = unit(10, 64), unit(32, 64, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        functional.linear(x, weight, 0.3)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_gated_activation_scale_of_the_gradient(std):
    # d c / d u = nu SiLU(z) has second moment 1 by the definition of nu, so a random gradient keeps its norm.
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
    torch.testing.assert_close(functional.interpolate(x, y, alpha), z)
    assert mean_norm(z) == pytest.approx(1, rel=0.01)
    z.backward(unit(1000, 256, seed=2))
    assert mean_norm(x.grad) == pytest.approx((1 - alpha) * nu)
    assert mean_norm(y.grad) == pytest.approx(alpha * nu)


def test_gradients_of_interpolations_agree_with_finite_differences():
    inputs = (random(2, 6), random(2, 6, seed=1), random(6, seed=2) * 0.1 + 0.2)
    arguments = tuple(value.requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(functional.interpolate, arguments)
    assert torch.autograd.gradcheck(functional.interpolate_exact, arguments)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(6,), (1, 2), (3, 7), (2, 5, 3, 64)])
@pytest.mark.parametrize("per_coordinate", [True, False])
def test_interpolate_norm_agrees_with_its_two_steps_forward_and_backward(shape, dtype, tolerance, per_coordinate):
    alpha = 0.3 * random(shape[-1] if per_coordinate else 1, seed=3)
    inputs = [value.to(dtype).requires_grad_() for value in (unit(*shape), 5 * random(*shape, seed=1), alpha)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    x, y, alpha = exact
    gradient = random(*shape, seed=2).to(dtype)
    z, expected = functional.interpolate_norm(*inputs), functional.interpolate(x, functional.normalize(y), alpha)
    grads = torch.autograd.grad(z, inputs, gradient)
    expected_grads = torch.autograd.grad(expected, exact, gradient.double())
    for ours, theirs in zip((z, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_interpolate_norm_takes_a_wider_second_tensor(dtype):
    x, y, alpha = random(4, 8).to(dtype).requires_grad_(), random(4, 8, seed=1), torch.full((8,), 0.3)
    z = functional.interpolate_norm(x, y, alpha)
    z.sum().backward()
    assert z.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(z, functional.interpolate_norm(x.double(), y, alpha.double()).to(dtype))


@pytest.mark.parametrize(("y", "alpha"), [((1, 5, 8), (8,)), ((5, 8), (8,)), ((2, 5, 8), (4,)), ((2, 5, 8), (1, 8))])
def test_interpolate_norm_refuses_tensors_of_other_shapes(y, alpha):
    with pytest.raises(ValueError) as error:
        functional.interpolate_norm(torch.randn(2, 5, 8), torch.randn(y), torch.rand(alpha))
    assert mentions(error.value, str((2, 5, 8)), str(y), str(alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolate_norm_has_the_same_gradients_compiled(dtype):
    """With torch 2.11 they were zero, since the forward pass returned the result of an operation in place."""
    inputs = [unit(4, 64).to(dtype), random(4, 64, seed=1).to(dtype), torch.full((64,), 0.3)]
    gradients = []
    for function in (functional.interpolate_norm, torch.compile(functional.interpolate_norm, backend="eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        function(*(leaf * 1 for leaf in leaves)).float().square().sin().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
    assert all(gradient.norm() > 0 for gradient in gradients[0])


def test_interpolate_norm_has_first_derivatives_and_refuses_second_ones():
    inputs = random(2, 6).requires_grad_(), random(2, 6, seed=1).requires_grad_(), random(6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(functional.interpolate_norm, inputs)
    assert functional.interpolate_norm(inputs[0], torch.zeros(2, 6), inputs[2]).isfinite().all()
    (grad,) = torch.autograd.grad(functional.interpolate_norm(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_residual_stream_keeps_its_dtype_and_saves_only_inputs_for_backward():
    x, y, alpha = random(50, 64).float().requires_grad_(), random(50, 64, seed=1).bfloat16(), random(64, seed=2).float()
    y.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        z = functional.interpolate_norm(x, y, alpha)
    assert z.dtype == torch.float32
    assert sum(tensor.nbytes for tensor in saved) == x.nbytes + y.nbytes + alpha.nbytes + 50 * 4
    z.sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16)


def test_exact_interpolation_has_unit_norm():
    z = functional.interpolate_exact(unit(100, 32), unit(100, 32, seed=1), torch.linspace(0.01, 0.9, 32).double())
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("rotary_dim", [0, 8, 16])
def test_rotary_agrees_with_complex_multiplication(rotary_dim):
    x = random(2, 10, 3, 16, dtype=torch.float32)
    rotary = functional.rotary_tables(torch.arange(10), rotary_dim, 10_000.0)
    y = functional.rotate(x, rotary)
    half = rotary_dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / max(rotary_dim, 1))
    rotation = torch.polar(torch.ones(10, half).double(), torch.arange(10).double()[:, None] * frequency)[:, None, :]
    paired = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double()) * rotation
    expected = torch.cat([paired.real, paired.imag, x[..., rotary_dim:].double()], dim=-1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_rotary_keeps_norms_and_scores_depend_only_on_distance():
    q, k = random(16), random(16, seed=1)
    rotary = functional.rotary_tables(torch.arange(30), 16, 100.0)
    q_all = functional.rotate(q.expand(1, 30, 1, 16), rotary)[0, :, 0]
    k_all = functional.rotate(k.expand(1, 30, 1, 16), rotary)[0, :, 0]
    scores = q_all @ k_all.T
    for distance in (0, 3, 20):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
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
    ours, theirs = functional.causal_attention(q, k, v, NO_POSITIONS, scale=0.7), reference_attention(q, k, v, 0.7)
    torch.testing.assert_close(ours, theirs)
    gradient = random(2, 9, 24, seed=4)
    grads = torch.autograd.grad(ours, (q, k, v), gradient)
    for grad, expected in zip(grads, torch.autograd.grad(theirs, (q, k, v), gradient), strict=True):
        torch.testing.assert_close(grad, expected)


def test_uniform_attention_shrinks_by_the_attention_factor():
    v = unit(64, 50, 1, 128)
    y = functional.causal_attention(torch.zeros_like(v), torch.zeros_like(v), v, NO_POSITIONS)
    scaled = y * factors.attention(torch.arange(1, 51)).unsqueeze(-1)
    torch.testing.assert_close(scaled.norm(dim=-1).mean(0), torch.ones(50, dtype=torch.float64), rtol=0.05, atol=0)


def test_split_heads_takes_contiguous_rows_for_each_head():
    # Rows 0-11 of the fused weight make head 0 (q, k, v of width 4), rows 12-23 head 1.
    q, k, v = functional.split_heads(torch.arange(24.0).view(1, 1, 24), 4)
    assert q[0, 0].tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert k[0, 0, 0].tolist() == [4, 5, 6, 7]
    assert v[0, 0, 1].tolist() == [20, 21, 22, 23]


def full_logits_loss(hidden, weight, targets):
    """Loss from the full logits, in float64."""
    return F.cross_entropy((hidden.double() @ weight.double().T).flatten(0, 1), targets.flatten())


def with_gradients(loss, hidden, weight, targets, share=0.37):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, targets)
    (value * share).backward()
    return value.detach(), hidden.grad, weight.grad


# Numbers of tokens around the size of a chunk, and sizes that do not fit vectorized kernels.
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 255), (2, 128), (3, 86), (5, 154)])
@pytest.mark.parametrize(("width", "vocabulary"), [(1, 2), (13, 101), (64, 1000)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_cross_entropy_agrees_with_full_logits(batch, tokens, width, vocabulary, dtype, tolerance):
    hidden = (random(batch, tokens, width) * 2).to(dtype)
    weight = (random(vocabulary, width, seed=1) / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(2))
    torch.full((10 * vocabulary * 128,), torch.nan)  # freed memory is reused, and its NaN must not be read
    results = with_gradients(functional.cross_entropy, hidden, weight, targets)
    expected = with_gradients(full_logits_loss, hidden.double(), weight.double(), targets)
    assert [part.dtype for part in results] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    with torch.no_grad():
        assert torch.equal(functional.cross_entropy(hidden, weight, targets), results[0])
        flat = functional.cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())
        assert torch.equal(flat, results[0])


@pytest.mark.parametrize("shape", [(2, 9), (2, 0), (20,), (2, 10, 1)])
def test_cross_entropy_refuses_targets_of_another_shape(shape):
    with pytest.raises(ValueError) as error:
        functional.cross_entropy(torch.randn(2, 10, 8), torch.randn(30, 8), torch.zeros(shape, dtype=torch.long))
    assert mentions(error.value, str((2, 10)), str(shape))


def test_cross_entropy_passes_the_checks_of_operators():
    hidden, weight = random(2, 70, 5).requires_grad_(), random(7, 5, seed=1).requires_grad_()
    targets = torch.randint(7, (2, 70), generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(functional.cross_entropy, (hidden, weight, targets))
    torch.library.opcheck(
        chunked_cross_entropy.loss_and_gradients, (hidden.flatten(0, 1), weight, targets.flatten(), True)
    )
    loss = functional.cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="create_graph") as error:
        torch.autograd.grad(loss, hidden, create_graph=True)
    assert "cross_entropy" in str(error.value)


def test_cross_entropy_under_autocast_multiplies_in_half_precision():
    hidden, weight = random(2, 100, 16).float(), random(50, 16, seed=1).float()
    targets = torch.randint(50, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = with_gradients(functional.cross_entropy, hidden, weight, targets)
    assert [part.dtype for part in results] == [torch.float32] * 3
    exact = with_gradients(functional.cross_entropy, hidden, weight, targets)
    rounded = with_gradients(functional.cross_entropy, hidden.bfloat16(), weight.bfloat16(), targets)
    assert results[0] != exact[0] and results[0] == rounded[0]
    for grad, exact_grad in zip(results[1:], exact[1:], strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=0.02, atol=0.02 * exact_grad.abs().max().item())


def test_the_full_logits_are_never_in_memory():
    hidden, weight = random(32, 128, 4).float().requires_grad_(), random(10_000, 4, seed=1).float().requires_grad_()
    targets = torch.zeros(32, 128, dtype=torch.int64)
    full_size = 32 * 128 * 10_000 * 4
    peak = peak_memory(lambda: functional.cross_entropy(hidden, weight, targets).backward(), torch.device("cpu"))
    assert peak < full_size / 4


class OnGpu:
    """Has the attributes of a tensor on a GPU that choose a kernel."""

    is_cuda = True


class Chosen(torch.nn.Module):
    """Adds 1 where the operators for compiled models on GPUs are chosen."""

    def forward(self, x):
        return x + kernels.is_compiled_for_gpu(OnGpu())


def test_operators_for_compiled_models_are_chosen_by_the_compiler_only():
    x, model = torch.zeros(2), Chosen()
    assert torch.compile(model, backend="eager", fullgraph=True)(x).tolist() == [1, 1]
    assert model(x).tolist() == [0, 0]
    for strict in (False, True) if kernels.KNOWS_EXPORT else (False,):
        assert torch.export.export(model, (x,), strict=strict).module()(x).tolist() == [0, 0]
