"""Parameter groups, learning rates and Muon."""

import re

import pytest
import torch
from torch import nn

from antransformer.training import trainer as trainer_module
from antransformer.training.config import resolve_config
from antransformer.training.defaults import SMALL_LR
from antransformer.training.learning_rates import format_rates, peak_rates
from antransformer.training.metrics import read_metrics
from antransformer.training.muon import Muon, newton_schulz
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.schedule import learning_rate
from helpers.trainers import ARCHITECTURES, start

NO_DECAY = {"weight_decay": 0, "cautious_weight_decay": False}


def test_weight_decay_applies_to_matrices_only(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", model={"architecture": "gpt+"})
    groups = trainer.optimizer.param_groups
    for group in groups:
        dims = {parameter.ndim for parameter in group["params"]}
        assert (dims, group["weight_decay"]) in (({2}, 0.1), ({1}, 0))
    sizes = [parameter.numel() for group in groups for parameter in group["params"]]
    assert sum(sizes) == trainer.model.parameter_count()
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.99) and trainer.optimizer.defaults["eps"] == 1e-9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learning_rate_of_matrices_scales_with_width(corpus, tmp_path, architecture):
    # The first step of Adam moves each coordinate with a gradient by the learning rate; bounds undo part of it.
    more = {"warmup_fraction": 0, "weight_decay": 0, "model": {"architecture": architecture, "width": 32}}
    trainer = start(corpus, tmp_path / "run", lr_width=8, **more)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.update(1)
    rate = learning_rate(1, 20, 1e-2)
    for name, parameter in trainer.model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        share = 1.0 if moved.ndim == 1 else 0.25 if name.startswith("blocks.") else 0.5
        assert float(moved[moved > 0].median()) == pytest.approx(share * rate, rel=0.1), name
    trainer.run()
    assert read_metrics(tmp_path / "run/metrics.jsonl")[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_the_scale_of_surrogates_only_divides_the_learning_rate_of_the_vectors(corpus, tmp_path, architecture):
    by_scale, by_rate, neither = (
        start(corpus, tmp_path / str(index), grad_clip=1e9, model={"architecture": architecture, **model}, **rates)
        for index, (model, rates) in enumerate([({"s_scale": 0.01}, {}), ({}, {"vector_lr": 3e-2}), ({}, {})])
    )
    tokens = torch.arange(32).reshape(2, 16) % 50
    logits = []
    for trainer in (by_scale, by_rate, neither):
        for step in range(1, 7):
            trainer.update(step)
        with torch.no_grad():
            logits.append(trainer.model(tokens))
    # Where a gradient is near 0, rounding decides the direction of Adam's first steps.
    assert (logits[0] - logits[1]).norm() < 0.03 * (logits[0] - logits[2]).norm()
    assert (logits[0] - logits[2]).abs().max() > 0.02


def test_muon_trains_the_matrices_inside_the_blocks(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", optimizer="muon", muon_lr=0.05, model={"architecture": "gpt+"})
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups]
    outer, vectors, inner = groups[0] | groups[1], groups[2], groups[3] | groups[4]
    assert groups[4] == {f"blocks.{layer}.attention.qkv_proj.weight" for layer in (0, 1)}
    assert groups[:2] == [{"embedding.weight"}, {"lm_head.weight"}]
    matrices = ("attention.qkv_proj", "attention.out_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    assert inner == {f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in matrices}
    assert len(outer) + len(vectors) + len(inner) == len(names)
    trainer.update(15)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    share = learning_rate(15, 20, 1.0, warmup_steps=2, min_lr_ratio=0.01)
    peaks = peak_rates(trainer.config)
    assert peaks.blocks == 0.05
    assert rates == pytest.approx([peak * share for peak in (*peaks, peaks.blocks)])


def test_muon_equals_torchs_with_separate_q_k_and_v(monkeypatch):
    # torch's is in bfloat16 everywhere.
    monkeypatch.setattr("antransformer.training.muon.multiplies_bfloat16", lambda device: True)
    torch.manual_seed(0)
    heads, width, shapes = 3, 8, [(24, 40), (40, 24), (72, 24)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    # Rows of q, k and v are ordered by head in our fused matrix; torch gets one matrix for each of them.
    q_k_v = split_qkv(ours[2], heads, width)
    theirs = [nn.Parameter(value.detach().clone()) for value in (*ours[:2], *q_k_v)]
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "head_dim": width}], lr=0.05, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        for weight in ours:
            weight.grad = torch.randn_like(weight)
        gradients = split_qkv(ours[2].grad, heads, width)
        for weight, gradient in zip(theirs, (ours[0].grad, ours[1].grad, *gradients), strict=True):
            weight.grad = gradient.clone()
        muon.step()
        torchs.step()
    updated = (*ours[:2], *split_qkv(ours[2], heads, width))
    for our_weight, their_weight in zip(updated, theirs, strict=True):
        torch.testing.assert_close(our_weight.detach(), their_weight.detach())


def test_muon_orthogonalizes_in_float32_on_a_processor_without_bfloat16(monkeypatch):
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    exact = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = exact @ exact.T
        exact = 3.4445 * exact + (-4.7750 * square + 2.0315 * square @ square) @ exact
    errors = []
    for has_instructions in (False, True):
        monkeypatch.setattr("antransformer.training.muon.multiplies_bfloat16", lambda device, has=has_instructions: has)
        errors.append(float((newton_schulz(matrix) - exact).abs().max()))
    assert errors[0] < 1e-5 < errors[1] < 0.05


def test_muon_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Muon([torch.ones(2, 2), torch.ones(3)], lr=0.02)
    with pytest.raises(ValueError, match="-1"):
        Muon([torch.ones(2, 2)], lr=-1)


def test_muon_rotates_rows_of_unit_norm_by_the_learning_rate(corpus, tmp_path):
    # Below it in float32: the first gradient of q and k has small singular values, which rounding to bfloat16 fills.
    for name, angles in rotations(start(corpus, tmp_path / "run", optimizer="muon", muon_lr=0.05)).items():
        assert angles.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.35), name


def rotations(trainer):
    """Angles by which the first step rotates the rows of each matrix inside the blocks, by its name."""
    matrices = {
        name: value for name, value in trainer.model.named_parameters() if name.startswith("blocks") and value.ndim == 2
    }
    before = {name: value.detach().clone() for name, value in matrices.items()}
    trainer.update(1)
    return {
        name: torch.cosine_similarity(value.detach(), before[name]).clamp(-1, 1).acos()
        for name, value in matrices.items()
    }


def reference_normuon(weights, gradients, lr, beta1=0.95, beta2=0.95, weight_decay=0.0, cautious=False):
    """NorMuon (arXiv:2510.05491, algorithm 1) with the scale of the official code, one matrix and row at a time."""
    weights = [weight.clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    moments = [[0.0] * len(weight) for weight in weights]
    for of_step in gradients:
        for weight, momentum, moment, gradient in zip(weights, momenta, moments, of_step, strict=True):
            momentum.mul_(beta1).add_((1 - beta1) * gradient)
            orthogonal = newton_schulz((1 - beta1) * gradient + beta1 * momentum)
            update = orthogonal.clone()
            for number, row in enumerate(orthogonal):
                moment[number] = beta2 * moment[number] + (1 - beta2) * float(row.square().sum()) / len(row)
                update[number] /= moment[number] ** 0.5
            update *= orthogonal.norm() / update.norm()
            decayed = torch.where(update.sign() * weight.sign() >= 0, weight, 0) if cautious else weight.clone()
            weight -= lr * (update + weight_decay * decayed)
    return weights


def split_qkv(matrix, heads, head_dim):
    """Rows of q, of k and of v in a fused matrix, whose rows are ordered by head."""
    return matrix.detach().view(heads, 3, head_dim, -1).transpose(0, 1).flatten(1, 2).unbind()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.5, "cautious": True}], ids=str)
def test_normuon_follows_its_paper_with_separate_q_k_and_v(options):
    torch.manual_seed(0)
    heads, width, shapes = 3, 8, [(24, 40), (40, 24), (72, 24)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [[torch.randn(shape) * torch.rand(shape[0], 1).square() for shape in shapes] for _ in range(4)]

    def parts(matrices):
        return [*matrices[:2], *split_qkv(matrices[2], heads, width)]

    expected = reference_normuon(parts([value.detach() for value in ours]), map(parts, gradients), 0.05, **options)
    normuon = Muon([{"params": ours[:2]}, {"params": ours[2:], "head_dim": width}], lr=0.05, beta2=0.95, **options)
    for of_step in gradients:
        for weight, gradient in zip(ours, of_step, strict=True):
            weight.grad = gradient.clone()
        normuon.step()
    for our_weight, their_weight in zip(parts(ours), expected, strict=True):
        torch.testing.assert_close(our_weight.detach(), their_weight)


def test_normuon_moves_rows_equally_and_as_far_as_muon_on_average(corpus, tmp_path):
    moved = {}
    for optimizer in ("muon", "normuon"):
        trainer = start(corpus, tmp_path / optimizer, optimizer=optimizer, model={"architecture": "gpt+"}, **NO_DECAY)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.update(1)
        matrices = [name for name, value in before.items() if name.startswith("blocks") and value.ndim == 2]
        moved[optimizer] = {name: (trainer.model.get_parameter(name) - before[name]).norm(dim=1) for name in matrices}
    for name, lengths in moved["normuon"].items():
        assert lengths.norm().item() == pytest.approx(moved["muon"][name].norm().item(), rel=1e-4)
        parts = [lengths] if "qkv" not in name else split_qkv(lengths.unsqueeze(1), 2, 32)
        for part in parts:  # the first moments are mean squares of this update
            assert part.max() / part.min() < 1.001, name
        assert moved["muon"][name].max() / moved["muon"][name].min() > 1.05, name


def test_normuon_rotates_every_row_of_angpt_by_about_the_learning_rate(corpus, tmp_path):
    for name, angles in rotations(start(corpus, tmp_path / "run", optimizer="normuon", muon_lr=0.05)).items():
        assert angles.min() > 0.03 and angles.max() < 0.06, name


def test_normuon_leaves_weights_without_gradients_where_they_are():
    weight = nn.Parameter(torch.randn(8, 4))
    weight.grad = torch.zeros(8, 4)
    before = weight.detach().clone()
    Muon([weight], lr=0.05, beta2=0.95).step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("architecture", ["gpt+", "angpt"])
def test_cautious_decay_spares_coordinates_that_grow(corpus, tmp_path, monkeypatch, architecture, optimizer):
    """A step with cautious decay differs from one without decay in the coordinates that shrink."""
    monkeypatch.setattr(trainer_module, "bind", lambda *_: None)  # a projection would change all coordinates
    after = {}
    options = {"optimizer": optimizer, "warmup_fraction": 0, "model": {"architecture": architecture}}
    for name, more in (("none", NO_DECAY), ("cautious", {"weight_decay": 0.5, "cautious_weight_decay": True})):
        trainer = start(corpus, tmp_path / name, **{**options, **more})
        initial = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
        trainer.update(1)
        after[name] = {key: value.detach() for key, value in trainer.model.named_parameters()}
    rates = {id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for key, parameter in trainer.model.named_parameters():
        free = after["none"][key]
        shrinks = (initial[key] - free) * initial[key] >= 0
        decay = rates[id(parameter)] * 0.5 * initial[key] * shrinks if parameter.ndim == 2 else 0
        moved = free != initial[key]  # the sign of a smaller update is lost in rounding
        torch.testing.assert_close(after["cautious"][key][moved], (free - decay)[moved], rtol=1e-5, atol=1e-7)
        assert parameter.ndim == 1 or 0.2 < shrinks.float().mean() < 0.8 or key == "embedding.weight"


def test_cautious_adamw_uses_the_sign_of_its_update_at_every_step(corpus, tmp_path):
    options = {"model": {"architecture": "gpt+"}, "weight_decay": 0.5, "cautious_weight_decay": True}
    trainer = start(corpus, tmp_path / "run", **options)
    weight = trainer.model.blocks[0].mlp.up_proj.weight
    for step in range(1, 4):
        before = weight.detach().clone()
        trainer.update(step)
        state, group = trainer.optimizer.state[weight], trainer.optimizer.param_groups[-1]
        scale = (1 - 0.9**step) * ((state["exp_avg_sq"] / (1 - 0.99**step)).sqrt() + 1e-9)
        decay = 0.5 * before * (state["exp_avg"] * before >= 0)
        expected = before - group["lr"] * (state["exp_avg"] / scale + decay)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-7)


def test_learning_rates_as_text():
    def numbers(**settings):
        config = resolve_config({"recipe": "paper", "lr": 1e-3, "tokens": "819,200", **settings}, 4096)
        return re.findall(r"\d[\d.,]*\d", format_rates(config))

    assert numbers() == numbers(lr_width=0) == ["0.001"]
    # Embedding and head, vectors, block matrices; lr and the width and steps at which it was tuned.
    assert numbers(lr_width=512) == ["0.002", "0.001", "0.004", "0.001", "512"]
    assert numbers(lr_width=512, optimizer="muon", muon_lr=0.03)[:3] == ["0.002", "0.001", "0.03"]
    horizon = {"lr_horizon": 100, "horizon_exponent": 0.5}  # a fourth of the steps of the run
    assert numbers(**horizon) == ["0.0005", "0.001", "100"]
    assert numbers(embed_lr=0.03, head_lr=0.01) == ["0.03", "0.01", "0.001"]


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, ["0.04", "600"]),
        ({"lr": 1.5e-3}, ["0.02", "600"]),
        ({"tokens": "2B"}, ["0.003", "11,610", "0.04", "600"]),
        ({"tokens": "10M"}, []),
        ({"muon_lr": 0.02}, []),
        ({"lr_horizon": 0}, []),
        ({"recipe": "paper"}, []),
    ],
)
def test_the_steps_from_which_the_default_rate_of_muon_falls_are_named(settings, numbers):
    text = format_rates(resolve_config({"preset": "32m", **settings}, 50_304))
    assert re.findall(r"\d[\d.,]*\d", text.partition(" (")[2].partition(" (")[2]) == numbers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_has_defaults_and_trains(corpus, tmp_path, optimizer):
    spec = OPTIMIZERS[optimizer]
    trainer = start(corpus, tmp_path / "run", optimizer=optimizer, lr=SMALL_LR["angpt"])
    assert spec.lr_setting is None or getattr(trainer.config, spec.lr_setting) == spec.default_lrs["angpt"]
    (loss, _), (later, _) = (trainer.update(step)[0] for step in (1, 2))
    assert loss.isfinite() and later.isfinite() and loss != later
