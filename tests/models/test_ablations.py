import math
from typing import get_args

import pytest
import torch

from antransformer import bind, factors
from antransformer.bounds import norms
from antransformer.errors import ConfigError
from antransformer.functional import normalize
from antransformer.models import ModelConfig, build
from antransformer.models.ablations import ABLATIONS
from antransformer.models.config import Ablation
from antransformer.nn import Linear, Residual
from antransformer.training.checkpointing import checkpoint
from antransformer.training.metrics import mean_alpha

SMALL = {"vocab_size": 61, "width": 64, "layers": 3, "context": 24, "head_dim": 16}
TIMES = {
    "constant-x0.5": 0.5,
    "constant-x2": 2,
    "all-x0.5": 0.5,
    "all-x2": 2,
}
REMOVED = ["constant-none", "all-none"]
TRAINING = ("strict", "model-axis", "no-bounds")  # ablations that do not change the function
FORWARD = [name for name in ABLATIONS if name not in TRAINING]
BOUNDED = [name for name in ABLATIONS if name != "no-bounds"]


def small(ablation="none", seed=0, **overrides):
    torch.manual_seed(seed)
    return build(ModelConfig(ablation=ablation, **{**SMALL, **overrides}))


def some_tokens(batch=3, length=24, seed=0):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def train(model, steps=4, lr=0.05):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    bind(model, optimizer)
    for step in range(steps):
        tokens = some_tokens(length=25, seed=step)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(scope="module")
def weights():
    model = small()
    train(model)
    return model.state_dict()


@torch.no_grad()
def logits(weights, ablation="none", gate=1.0, **options):
    """Logits in float64 with the given weights, except those that the ablation lacks; ``gate`` scales W_z."""
    model = small(ablation, **options).double()
    model.load_state_dict(weights, strict=ablation != "no-lerp")
    for block in model.blocks:
        block.mlp.gate_proj.weight.mul_(gate)
    return model(some_tokens())


def test_names_of_the_config_and_of_the_table_agree():
    assert set(get_args(Ablation)) == {"none", *ABLATIONS}
    assert ModelConfig().ablation == "none" and ModelConfig(architecture="gpt+").ablation is None
    with pytest.raises(ConfigError) as error:
        ModelConfig(ablation="no-lurp")
    assert all(name in str(error.value) for name in ("ablation", "no-lurp", "none", *ABLATIONS))


# Values of changed factors. At width 64 with heads of 16: nu_qkv 2, nu_p 1/2, nu_uz 1/2, nu_d 2; the gate's scale is 8.


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_constant_factors(ablation):
    model = small(ablation)
    nu_act = factors.activation(torch.nn.functional.silu, std=0.5)  # of the gate without the ablation
    times = TIMES.get(ablation, 1)
    expected = {
        "attention.qkv_proj": 2 * times,
        "attention.out_proj": times / 2,
        "mlp.up_proj": times / 2 * times * nu_act,
        "mlp.gate_proj": times / 2 * 8,
        "mlp.down_proj": 2 * times,
    }
    if ablation in REMOVED:
        expected = {name: 8 if name.endswith("gate_proj") else 1 for name in expected}
    for block in model.blocks:
        found = {name: module.factor for name, module in block.named_modules() if isinstance(module, Linear)}
        assert found == pytest.approx(expected)
    assert model.lm_head.factor == 1


def test_removing_factors_keeps_the_scale_of_the_gate():
    for gate_scale, expected in (("none", 1), ("sqrt_mlp", 16)):
        block = small("constant-none", gate_scale=gate_scale).blocks[0]
        assert block.mlp.gate_proj.factor == expected
        assert small("constant-x2", gate_scale=gate_scale).blocks[0].attention.out_proj.factor == 1


@pytest.mark.parametrize("ablation", ["none", *ABLATIONS])
def test_residual_updates(ablation):
    generator = torch.Generator().manual_seed(2)
    x, y = normalize(torch.randn((2, 5, 64), generator=generator, dtype=torch.float64))
    for block in small(ablation).double().blocks:
        for residual in (block.attention_residual, block.mlp_residual):
            if ablation == "no-lerp":
                torch.testing.assert_close(residual(x, 3 * y), (x + y) / math.sqrt(2))
                continue
            with torch.no_grad():
                residual.alpha.value.mul_(
                    1 + 3 * torch.rand(residual.alpha.value.shape, generator=generator, dtype=torch.float64)
                )
            alpha = residual.alpha()
            nu = 1 if ablation in ("residual-none", "all-none") else (alpha**2 + (1 - alpha) ** 2).rsqrt()
            times = 1 if ablation.startswith("constant") else TIMES.get(ablation, 1)
            torch.testing.assert_close(residual(x, 3 * y), (x + alpha * (y - x)) * nu * times)


def test_alphas():
    for ablation in ["none", *ABLATIONS]:
        model = small(ablation)
        shapes = {module.alpha().shape for module in model.modules() if isinstance(module, Residual)}
        size = {"scalar-alpha": 1, "no-lerp": 0}.get(ablation, 64)
        assert shapes == ({(size,)} if size else set())
        assert model.parameter_count() == small().parameter_count() - 6 * (64 - size)
        assert mean_alpha(model) is None if ablation == "no-lerp" else mean_alpha(model).item() == pytest.approx(0.05)


@pytest.mark.parametrize("ablation", ["none", *FORWARD])
def test_the_residual_stream_has_the_predicted_norm(ablation):
    # y has norm 1 and is about orthogonal to x, so the norm becomes times * nu * sqrt(((1 - a) n)^2 + a^2).
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=4096, width=256, layers=4, context=8, ablation=ablation))
    seen, expected, norm, alpha = [], [], 1.0, 0.05
    for block in model.blocks:
        for residual in (block.attention_residual, block.mlp_residual):
            residual.register_forward_hook(lambda _module, _inputs, x: seen.append(x.norm(dim=-1).mean().item()))
            if ablation == "no-lerp":
                norm = math.hypot(norm, 1) / math.sqrt(2)
            else:
                norm = math.hypot((1 - alpha) * norm, alpha)
                norm *= 1 if ablation in ("residual-none", "all-none") else factors.residual(alpha)
                norm *= 1 if ablation.startswith("constant") else TIMES.get(ablation, 1)
            expected.append(norm)
    with torch.no_grad():
        model(torch.randint(0, 4096, (2000, 1)))
    assert seen == pytest.approx(expected, rel=0.05)
    predicted = {"none": 1, "residual-none": 0.68, "all-x0.5": 0.0306, "all-x2": 256}
    assert expected[-1] == pytest.approx(predicted.get(ablation, expected[-1]), rel=0.01)


# Functions of the same weights.


@pytest.mark.parametrize("ablation", TRAINING)
def test_bounds_do_not_change_the_function(weights, ablation):
    assert torch.equal(logits(weights, ablation), logits(weights))


@pytest.mark.parametrize(("ablation", "gate"), [("constant-x0.5", 0.5), ("constant-x2", 2), ("constant-none", 2)])
def test_constant_factors_change_the_function_only_through_the_gate(weights, ablation, gate):
    torch.testing.assert_close(logits(weights, ablation), logits(weights, gate=gate), rtol=1e-9, atol=1e-9)


def test_doubled_and_removed_constants_equal_a_gate_of_unit_variance(weights):
    for ablation in ("constant-x2", "constant-none"):
        torch.testing.assert_close(
            logits(weights, ablation), logits(weights, gate_scale="sqrt_mlp"), rtol=1e-9, atol=1e-9
        )
    for ablation in ("all-x2", "all-none"):  # the residual updates differ
        assert (logits(weights, ablation) - logits(weights, "constant-x2")).abs().max() > 0.01


def test_all_other_ablations_are_different_functions(weights):
    found = {name: logits(weights, name) for name in FORWARD if name not in ("constant-none", "scalar-alpha")}
    found["none"] = logits(weights)
    for first in found:
        for second in found:
            if first < second:
                assert (found[first] - found[second]).norm() > 1e-3 * found["none"].norm(), (first, second)


def test_scalar_alpha_is_the_same_function_until_alphas_differ():
    vector, scalar = small(), small("scalar-alpha")
    scalar.load_state_dict(
        {name: value[:1] if "alpha" in name else value for name, value in vector.state_dict().items()}
    )
    with torch.no_grad():
        torch.testing.assert_close(scalar(some_tokens()), vector(some_tokens()))
        vector.blocks[0].mlp_residual.alpha.value[:32] *= 3
        assert (scalar(some_tokens()) - vector(some_tokens())).abs().max() > 0.01


# Bounds after training steps.


@pytest.mark.parametrize("ablation", BOUNDED)
def test_bounds_hold_from_the_start_and_after_real_steps(ablation):
    model = small(ablation)
    for bound in model.bounds():
        into_stream = bound.name.endswith(("out_proj.weight", "down_proj.weight"))
        assert bound.axis == (0 if into_stream and "model-axis" in ablation else 1)
        assert bound.strict == ("strict" in ablation)
        torch.testing.assert_close(norms(bound), torch.ones_like(norms(bound)))
    assert [bound.name for bound in model.bounds()] == [bound.name for bound in small().bounds()]
    train(model)
    lengths = [norms(bound) for bound in model.bounds()]
    assert max(length.max() for length in lengths) <= 1 + 1e-6
    if "strict" in ablation:
        assert min(length.min() for length in lengths) >= 1 - 1e-6


@pytest.mark.parametrize("ablation", BOUNDED)
def test_only_strict_forbids_short_vectors(ablation):
    model = small(ablation)
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight.div_(2)
    train(model, steps=1, lr=1e-3)
    lengths = {bound.name: norms(bound) for bound in model.bounds()}["blocks.0.mlp.down_proj.weight"]
    assert lengths.min() > 1 - 1e-6 if "strict" in ablation else lengths.max() < 0.6


def test_bounds_along_the_model_axis_leave_rows_of_output_projections_free():
    model = small("model-axis")
    train(model)
    down = model.blocks[0].mlp.down_proj.weight
    assert down.norm(dim=0).max() <= 1 + 1e-6 < 1.5 < down.norm(dim=1).max()


def test_without_bounds_rows_grow_from_norm_1():
    model, bounds = small("no-bounds"), small().bounds()
    assert model.bounds() == []
    rows = [model.get_parameter(bound.name) for bound in bounds]
    for row in rows:
        torch.testing.assert_close(row.norm(dim=1), torch.ones(len(row)))
    train(model)
    assert min(row.norm(dim=1).max() for row in rows) > 1.05


# Properties of every ablation; others are in test_models.py.


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_half_precision_stays_half(ablation):
    assert small(ablation).bfloat16()(some_tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_checkpoint_brings_it_back(ablation, tmp_path):
    model = small(ablation)
    optimizer = train(model, steps=1)
    path = checkpoint.save(tmp_path, 1, model, optimizer, extra={}, keep=1)
    restored = checkpoint.restore(checkpoint.read(path), torch.device("cpu"))
    assert restored.config.ablation == ablation
    with torch.no_grad():
        assert torch.equal(restored(some_tokens()), model(some_tokens()))
