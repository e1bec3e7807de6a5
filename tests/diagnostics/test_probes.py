import json
import math

import pytest
import torch
from torch import nn

from antransformer.bounds import bind
from antransformer.diagnostics.probes import layer_alphas, moment_variance, probe
from antransformer.models import ModelConfig, build
from antransformer.models.ablations import ABLATIONS
from antransformer.models.registry import BUILT_IN

SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "context": 16, "head_dim": 32}


def model_of(architecture="angpt", **more):
    torch.manual_seed(0)
    return build(ModelConfig(architecture=architecture, **{**SIZES, **more}))


def some_tokens():
    return torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))


def adam(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    bind(model, optimizer)
    return optimizer


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model.loss(some_tokens(), some_tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_norms_are_those_of_a_forward_pass_by_hand(architecture):
    model, tokens = model_of(architecture), some_tokens()
    optimizer = adam(model)
    train(model, optimizer)
    measured = probe(model, optimizer, tokens)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    with torch.no_grad():
        assert measured["residual_norm"][-1] == pytest.approx(float(model.hidden(tokens).norm(dim=-1).mean()), rel=1e-5)
        blocks, model.blocks = model.blocks, model.blocks[:1]
        assert measured["residual_norm"][1] == pytest.approx(float(model.hidden(tokens).norm(dim=-1).mean()), rel=1e-5)
        assert measured["residual_norm"][0] == pytest.approx(float(model.embed(tokens).norm(dim=-1).mean()), rel=1e-5)
        model.blocks = blocks
    assert len(measured["residual_norm"]) == 3
    if architecture == "ngpt":
        assert measured["residual_norm"] == pytest.approx([1, 1, 1], abs=1e-5)
        assert measured["row_norm"] == pytest.approx({"mean": 1, "min": 1, "max": 1}, abs=1e-5)
    else:
        matrices = [weight for weight in model.parameters() if weight.ndim == 2]
        rows = torch.cat([weight.detach().norm(dim=1) for weight in matrices])
        by_hand = {"mean": float(rows.mean()), "min": float(rows.min()), "max": float(rows.max())}
        assert measured["row_norm"] == pytest.approx(by_hand, rel=1e-5)
    assert (measured["alpha"] is None) == (architecture not in ("angpt", "ngpt"))


def test_alpha_by_layer_and_sublayer():
    model = model_of()
    with torch.no_grad():
        model.blocks[1].mlp_residual.alpha.value.mul_(3)
        model.blocks[0].attention_residual.alpha.value[:32].mul_(2)
    assert layer_alphas(model) == [pytest.approx([0.075, 0.05]), pytest.approx([0.05, 0.15])]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_can_be_probed(ablation):
    model = model_of(ablation=ablation)
    measured = probe(model, adam(model), some_tokens())
    assert all(math.isfinite(value) for value in measured["residual_norm"])
    alpha = None if ablation == "no-lerp" else [pytest.approx([0.05, 0.05])] * 2
    assert measured["alpha"] == alpha


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_probe_leaves_model_optimizer_and_random_state_unchanged(architecture):
    model = model_of(architecture)
    optimizer = adam(model)
    train(model, optimizer)
    model.loss(some_tokens(), some_tokens()).backward()
    model.blocks[0].eval()  # a mode that differs from the model's
    before = [
        (weight.detach().clone(), weight.grad.clone(), optimizer.state[weight]["exp_avg"].clone())
        for weight in model.parameters()
    ]
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    probe(model, optimizer, some_tokens())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    for weight, (value, grad, moment) in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, value) and torch.equal(weight.grad, grad)
        assert torch.equal(optimizer.state[weight]["exp_avg"], moment)


def variance_after(gradients, make=torch.optim.Adam, **options):
    """Relative variance after one optimizer step with each of these gradients."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = make([weight], lr=1e-3, **options)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return moment_variance(optimizer)


def test_first_moment_of_equal_gradients_has_no_variance():
    gradient = torch.tensor([0.3, -2.0, 1e-3])
    assert variance_after([gradient] * 50) == pytest.approx(0, abs=1e-5)


def test_first_moment_of_noise_is_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2000, generator=generator)
    kept = (1 - 0.9) / (1 + 0.9)
    assert variance_after(noise, betas=(0.9, 0.999)) == pytest.approx(1 - kept, abs=0.03)
    # With this mean, signal and noise of the average are equal, which halves the ratio.
    assert variance_after(noise + math.sqrt(kept), betas=(0.9, 0.999)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.5, 0.9)])
def test_variance_against_explicit_weighted_averages(betas):
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights, squares = (torch.tensor([beta ** (6 - step) for step in range(7)], dtype=torch.float64) for beta in betas)
    weights, squares = weights / weights.sum(), squares / squares.sum()
    m, v = weights @ gradients, squares @ gradients.square()
    expected = weights.square().sum() * (v - m**2).clamp_min(0).sum() / m.square().sum()
    assert variance_after(gradients, betas=betas) == pytest.approx(float(expected), rel=1e-6)


def test_variance_is_none_without_both_moments():
    gradient = torch.ones(3)
    assert variance_after([gradient], torch.optim.SGD, momentum=0.9) is None
    model = model_of()
    optimizer = adam(model)
    assert moment_variance(optimizer) is None and not optimizer.state
    assert variance_after([torch.zeros(3)] * 2) is None
