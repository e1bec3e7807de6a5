"""Parameter groups, learning rates and Muon."""

import re

import pytest
import torch
from torch import nn

from antransformer.training.config import resolve_config
from antransformer.training.learning_rates import format_rates, peak_rates
from antransformer.training.metrics import read_metrics
from antransformer.training.muon import Muon
from antransformer.training.optimizer_registry import OPTIMIZERS, split_variant
from antransformer.training.schedule import learning_rate
from helpers.trainers import ARCHITECTURES, start


def test_weight_decay_applies_to_matrices_only(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", model={"architecture": "gpt+"})
    groups = trainer.optimizer.param_groups
    for group in groups:
        dims = {parameter.ndim for parameter in group["params"]}
        assert (dims, group["weight_decay"]) in (({2}, 0.1), ({1}, 0))
    sizes = [parameter.numel() for group in groups for parameter in group["params"]]
    assert sum(sizes) == trainer.model.parameter_count()
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.95) and trainer.optimizer.defaults["eps"] == 1e-9


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


def test_muon_equals_torchs_with_separate_q_k_and_v():
    torch.manual_seed(0)
    heads, width, shapes = 3, 8, [(24, 40), (40, 24), (72, 24)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    # Rows of q, k and v are ordered by head in our fused matrix; torch gets one matrix for each of them.
    q_k_v = ours[2].detach().view(heads, 3, width, 24).transpose(0, 1).flatten(1, 2).unbind()
    theirs = [nn.Parameter(value.detach().clone()) for value in (*ours[:2], *q_k_v)]
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "head_dim": width}], lr=0.05, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        for weight in ours:
            weight.grad = torch.randn_like(weight)
        gradients = ours[2].grad.view(heads, 3, width, 24).transpose(0, 1).flatten(1, 2)
        for weight, gradient in zip(theirs, (ours[0].grad, ours[1].grad, *gradients), strict=True):
            weight.grad = gradient.clone()
        muon.step()
        torchs.step()
    updated = (*ours[:2], *ours[2].view(heads, 3, width, 24).transpose(0, 1).flatten(1, 2))
    for our_weight, their_weight in zip(updated, theirs, strict=True):
        torch.testing.assert_close(our_weight, their_weight)


def test_muon_rotates_rows_of_unit_norm_by_the_learning_rate(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", optimizer="muon", muon_lr=0.05)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.update(1)
    for name, value in trainer.model.named_parameters():
        if name.startswith("blocks") and value.ndim == 2:
            angles = torch.cosine_similarity(value.detach(), before[name]).clamp(-1, 1).acos()
            assert angles.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.3), name


def test_learning_rates_as_text():
    def numbers(**settings):
        config = resolve_config({"lr": 1e-3, "tokens": "819,200", **settings}, 4096)
        return re.findall(r"\d[\d.,]*\d", format_rates(config))

    assert numbers() == numbers(lr_width=0) == ["0.001"]
    # Embedding and head, vectors, block matrices; lr and the width and steps at which it was tuned.
    assert numbers(lr_width=512) == ["0.002", "0.001", "0.004", "0.001", "512"]
    assert numbers(lr_width=512, optimizer="muon", muon_lr=0.03)[:3] == ["0.002", "0.001", "0.03"]
    horizon = {"lr_horizon": 100, "horizon_exponent": 0.5}  # a fourth of the steps of the run
    assert numbers(**horizon) == ["0.0005", "0.001", "100"]
    assert numbers(embed_lr=0.03, head_lr=0.01) == ["0.03", "0.01", "0.001"]


def test_names_of_variants_select_the_optimizer():
    assert split_variant("angpt") == ("angpt", None) and split_variant("gpt+-muon") == ("gpt+", "muon")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_has_defaults_and_trains(corpus, tmp_path, optimizer):
    spec = OPTIMIZERS[optimizer]
    trainer = start(corpus, tmp_path / "run", optimizer=optimizer)
    assert spec.lr_setting is None or getattr(trainer.config, spec.lr_setting) == spec.default_lrs["angpt"]
    (loss, _), (later, _) = (trainer.update(step)[0] for step in (1, 2))
    assert loss.isfinite() and later.isfinite() and loss != later
