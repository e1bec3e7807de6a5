import pytest
import torch
from torch import nn

import antransformer
from antransformer.bounds import Bound, norms, project_
from antransformer.models import ModelConfig, build

SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "context": 16, "head_width": 32}
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    "adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.05, fused=True),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.5),
}


def model_of(architecture):
    torch.manual_seed(0)
    return build(ModelConfig(architecture=architecture, **SIZES))


def train(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 50, (4, 17), generator=generator)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_bounds_hold_after_real_steps_of_any_optimizer(architecture, optimizer):
    model = model_of(architecture)
    before = {name: value.clone() for name, value in model.named_parameters()}
    stepper = OPTIMIZERS[optimizer](model.parameters())
    antransformer.bind(model, stepper)
    train(model, stepper)
    assert len(model.bounds()) == 12  # embedding, head, and five matrices in each of two blocks
    for bound in model.bounds():
        assert not torch.equal(bound.parameter, before[bound.name])
        assert norms(bound).max() <= 1 + 1e-6
        if bound.strict:
            assert norms(bound).min() >= 1 - 1e-6
    strict = {bound.strict for bound in model.bounds()}
    assert strict == {architecture == "ngpt"}


def test_without_the_bound_the_same_steps_leave_the_ball():
    model = model_of("angpt")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    handle = antransformer.bind(model, optimizer)
    handle.remove()
    train(model, optimizer)
    assert max(norms(bound).max() for bound in model.bounds()) > 1.1


def test_every_matrix_is_bounded_along_its_rows_in_angpt_and_along_the_model_axis_in_ngpt():
    for architecture in ("angpt", "ngpt"):
        model = model_of(architecture)
        named = dict(model.named_parameters())
        assert {bound.name for bound in model.bounds()} == {name for name, value in named.items() if value.ndim == 2}
        for bound in model.bounds():
            assert bound.parameter is named[bound.name]
            into_stream = architecture == "ngpt" and bound.name.endswith(("out_proj.weight", "down_proj.weight"))
            assert bound.axis == (0 if into_stream else 1)
            torch.testing.assert_close(norms(bound), torch.ones_like(norms(bound)))
    assert model_of("gpt+").bounds() == []


def test_vectors_inside_the_ball_keep_every_bit_and_zero_stays_reachable():
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(200, 30, generator=generator) / 30**0.5)
    with torch.no_grad():
        weight[0] = 0
    before = weight.detach().clone()
    inside = before.norm(dim=1) < 0.999
    assert 20 < inside.sum() < 180
    project_([Bound("weight", weight)])
    assert torch.equal(weight[inside], before[inside])
    after = weight.detach().norm(dim=1)
    torch.testing.assert_close(after[~inside], torch.ones(int((~inside).sum())), rtol=2e-3, atol=0)
    project_([Bound("weight", weight, axis=1, strict=True)])
    assert torch.equal(weight[0], torch.zeros(30))
    torch.testing.assert_close(weight[1:].norm(dim=1), torch.ones(199))
    project_([Bound("weight", weight, axis=0, strict=True)])
    torch.testing.assert_close(weight.norm(dim=0), torch.ones(30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_are_computed_in_float32_at_least(dtype):
    # 4,096 squares of 1/32 sum to 4; half precision would lose most of them on the way.
    weight = nn.Parameter(torch.full((2, 4096), 1 / 32, dtype=dtype))
    bound = Bound("weight", weight)
    assert norms(bound).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms(bound).flatten().tolist() == pytest.approx([2, 2])
    project_([bound])
    assert weight.dtype == dtype
    assert weight.float().flatten().tolist() == pytest.approx([1 / 64] * 8192)


def test_projecting_needs_no_value_on_the_host():
    # Fake tensors have no values: anything that looked at one would raise.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for strict in (False, True):
            project_([Bound("weight", nn.Parameter(torch.empty(4, 3)), axis=1, strict=strict)])
        with pytest.raises(RuntimeError):
            torch.empty(4).sum().item()


def test_bind_refuses_what_it_can_not_bind():
    model = model_of("angpt")
    with pytest.raises(TypeError, match="Linear lists no bounds"):
        antransformer.bind(nn.Linear(2, 2), OPTIMIZERS["sgd"](model.parameters()))
    with pytest.raises(ValueError, match="steps none of the model's bounded parameters"):
        antransformer.bind(model, OPTIMIZERS["sgd"](model_of("angpt").parameters()))


def test_bind_takes_the_part_of_the_model_that_the_optimizer_steps():
    model = model_of("angpt")
    optimizer = OPTIMIZERS["sgd"](model.blocks.parameters())
    antransformer.bind(model, optimizer)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    train(model, optimizer)
    assert model.embedding.weight.norm(dim=1).min() > 1.9
    assert max(norms(bound).max() for bound in model.bounds() if bound.name.startswith("blocks")) <= 1 + 1e-6
