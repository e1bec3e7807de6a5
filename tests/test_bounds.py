import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import antransformer
from antransformer import bounds
from antransformer.bounds import Bound, norms, project_
from antransformer.models import ModelConfig, build
from antransformer.nn import Linear
from helpers.small import Watch

SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "context": 16, "head_dim": 32}


def single(make, **options):
    """A single optimizer for all parameters."""
    return lambda model: [make(model.parameters(), **options)]


def muon_and_adam(model):
    """Muon for the matrices of the blocks and AdamW for all other parameters, as its authors recommend."""
    inner = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in inner)]
    return [torch.optim.Muon(inner, lr=0.05), torch.optim.AdamW(others, lr=0.05)]


def three_optimizers(model):
    """One optimizer for each block and single for all other parameters."""
    blocks = set(model.blocks.parameters())
    others = [parameter for parameter in model.parameters() if parameter not in blocks]
    first, second = (block.parameters() for block in model.blocks)
    return [torch.optim.SGD(others, lr=0.02), torch.optim.Adam(first, lr=0.05), torch.optim.RMSprop(second, lr=0.01)]


OPTIMIZERS = {
    "adam": single(torch.optim.Adam, lr=0.05),
    "adam fused": single(torch.optim.Adam, lr=0.05, fused=True),
    "adam foreach": single(torch.optim.Adam, lr=0.05, foreach=True),
    "adamw": single(torch.optim.AdamW, lr=0.05),
    "adamw fused": single(torch.optim.AdamW, lr=0.05, fused=True),
    "adamw foreach": single(torch.optim.AdamW, lr=0.05, foreach=True),
    "sgd": single(torch.optim.SGD, lr=0.02, momentum=0.9),
    "sgd fused": single(torch.optim.SGD, lr=0.02, momentum=0.9, fused=True),
    "adafactor": single(torch.optim.Adafactor, lr=0.5),
    "muon and adam": muon_and_adam,
    "three optimizers": three_optimizers,
}


def model_of(architecture):
    torch.manual_seed(0)
    return build(ModelConfig(architecture=architecture, **SIZES))


def some_loss(model, seed, batch=4):
    tokens = torch.randint(0, 50, (batch, 17), generator=torch.Generator().manual_seed(seed))
    return model.loss(tokens[:, :-1], tokens[:, 1:])


def train(model, *optimizers, steps=4):
    for step in range(steps):
        some_loss(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("optimizers", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_bounds_hold_after_every_real_step_of_any_optimizer(architecture, optimizers):
    model = model_of(architecture)
    before = {name: value.clone() for name, value in model.named_parameters()}
    steppers = OPTIMIZERS[optimizers](model)
    watches = [Watch(model, stepper) for stepper in steppers]
    train(model, *steppers)
    assert [watch.steps for watch in watches] == [4] * len(steppers)
    # embedding, head, and five matrices in each of two blocks
    assert {bound.name for watch in watches for bound in watch.bounds} == {bound.name for bound in model.bounds()}
    assert sum(len(watch.bounds) for watch in watches) == len(model.bounds()) == 12
    for bound in model.bounds():
        assert not torch.equal(bound.parameter, before[bound.name])
    assert {bound.strict for bound in model.bounds()} == {architecture == "ngpt"}
    assert (sum(watch.inside for watch in watches) > 0) == (architecture == "angpt")


def test_gradient_accumulation_projects_once_per_step():
    model = model_of("angpt")
    (optimizer,) = OPTIMIZERS["adamw"](model)
    watch = Watch(model, optimizer)
    for step in range(6):
        (some_loss(model, step) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert watch.steps == 3


@pytest.mark.parametrize("optimizer", ["adamw foreach", "adamw fused", "sgd"])
def test_a_gradient_scaler_may_skip_a_step(optimizer):
    model = model_of("angpt")
    (stepper,) = OPTIMIZERS[optimizer](model)
    watch = Watch(model, stepper)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        before = {bound.name: bound.parameter.detach().clone() for bound in watch.bounds}
        scaler.scale(some_loss(model, step)).backward()
        if step == 2:
            model.lm_head.weight.grad[0, 0] = math.inf
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
        for bound in watch.bounds:
            value, old = bound.parameter.detach(), before[bound.name]
            if step == 2:  # a fused optimizer still runs its step, so rows may be rounded again
                torch.testing.assert_close(value, old, rtol=2e-7 if "fused" in optimizer else 0, atol=0)
            else:
                assert not torch.equal(value, old)
    assert watch.steps == (4 if "fused" in optimizer else 3) and scaler.get_scale() == 2.0**9


def test_bounds_hold_after_compiled_steps():
    model = model_of("angpt")
    (stepper,) = OPTIMIZERS["adamw foreach"](model)
    watch = Watch(model, stepper)

    @torch.compile(backend="eager")  # this tests what is captured, not the generated code
    def step():
        stepper.step()

    for number in range(3):
        some_loss(model, number).backward()
        step()
        stepper.zero_grad()
    assert watch.steps == 3


def test_compiled_steps_project_what_is_trained_now():
    model = torch.nn.Sequential(Linear(8, 8), Linear(8, 8))
    stepper = torch.optim.SGD(model.parameters(), lr=0.5)
    antransformer.bind(model, stepper)
    step = torch.compile(stepper.step, backend="eager")
    for frozen, trained in ((0, 1), (1, 0)):
        model[frozen].weight.requires_grad_(False)
        model[trained].weight.requires_grad_(True)
        with torch.no_grad():
            for module in model:
                module.weight.copy_(3 * torch.nn.functional.normalize(module.weight))
        model(torch.randn(4, 8)).square().sum().backward()
        step()
        stepper.zero_grad()
        assert model[frozen].weight.norm(dim=1).min() > 2.9
        assert model[trained].weight.norm(dim=1).max() <= 1 + 1e-6


def test_bounds_hold_after_steps_with_a_closure():
    model = model_of("angpt")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=2)
    watch = Watch(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = some_loss(model, 0)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert watch.steps == 2


@pytest.fixture
def single_process_group():
    """A process group of single rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bounds_hold_in_ddp(single_process_group):
    model = model_of("angpt")
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.05)
    watch = Watch(wrapped, optimizer)
    for step in range(3):
        tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(wrapped(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert watch.steps == 3 and len(watch.bounds) == 12


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused(single_process_group, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = model_of("angpt")
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = torch.optim.Adam(wrapped.parameters())
    for module in (wrapped, model):
        with pytest.raises(TypeError, match=r"fully_shard"):
            antransformer.bind(module, optimizer)


def test_bounds_hold_with_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = model_of("angpt")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    (optimizer,) = OPTIMIZERS["adamw"](model)
    watch = Watch(model, optimizer)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    for step in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(some_loss(prepared, step))
            wrapped.step()
            wrapped.zero_grad()
    assert watch.steps == 3


def test_bind_takes_the_optimizer_that_accelerate_has_wrapped():
    accelerate = pytest.importorskip("accelerate")
    model = model_of("angpt")
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(model, *OPTIMIZERS["adam"](model))
    antransformer.bind(prepared, wrapped)
    train(prepared, wrapped)
    assert max(norms(bound).max() for bound in model.bounds()) < 1 + 1e-6


def test_without_bounds_the_same_steps_leave_the_unit_ball():
    model = model_of("angpt")
    (optimizer,) = OPTIMIZERS["adam"](model)
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


def test_vectors_inside_the_ball_keep_every_bit_and_zero_stays_zero():
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
    # 4,096 squares of 1/32 sum to 4. A sum in half precision would lose most of them.
    weight = nn.Parameter(torch.full((2, 4096), 1 / 32, dtype=dtype))
    bound = Bound("weight", weight)
    assert norms(bound).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms(bound).flatten().tolist() == pytest.approx([2, 2])
    project_([bound])
    assert weight.dtype == dtype
    assert weight.float().flatten().tolist() == pytest.approx([1 / 64] * 8192)


def test_projection_reads_no_value_on_the_host():
    # Fake tensors have no values, so reading single raises.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for strict in (False, True):
            project_([Bound("weight", nn.Parameter(torch.empty(4, 3)), axis=1, strict=strict)])
        with pytest.raises(RuntimeError):
            torch.empty(4).sum().item()


def test_bind_refuses_models_without_bounds_and_optimizers_of_other_models():
    model = model_of("angpt")
    with pytest.raises(TypeError, match="Linear") as error:
        antransformer.bind(nn.Linear(2, 2), *OPTIMIZERS["sgd"](model))
    assert "antransformer.nn" in str(error.value) and "bounds()" in str(error.value)
    with pytest.raises(ValueError) as error:
        antransformer.bind(model, *OPTIMIZERS["sgd"](model_of("angpt")))
    assert error.traceback[-1].name == "bind"  # raised by bind itself


def test_bind_projects_only_parameters_of_the_optimizer_and_those_that_are_added_later():
    model = model_of("angpt")
    optimizer = torch.optim.SGD(model.blocks.parameters(), lr=0.02, momentum=0.9)
    antransformer.bind(model, optimizer)
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("blocks")]
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    train(model, optimizer)
    assert model.embedding.weight.norm(dim=1).min() > 1.9
    assert max(norms(bound).max() for bound in model.bounds() if bound.name.startswith("blocks")) <= 1 + 1e-6
    optimizer.add_param_group({"params": others})
    train(model, optimizer)
    assert max(norms(bound).max() for bound in model.bounds()) <= 1 + 1e-6


def test_modules_that_are_added_after_bind_are_bounded_too():
    model = torch.nn.Sequential(Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    antransformer.bind(model, optimizer)
    model.append(Linear(8, 8))
    model.append(Linear(8, 8))
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.param_groups[0]["params"] += model[2].parameters()
    with torch.no_grad():
        for module in model:
            module.weight.mul_(3)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert max(module.weight.norm(dim=1).max() for module in model) <= 1 + 1e-6


def test_parameters_that_replace_others_are_bounded():
    model = torch.nn.Sequential(Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    antransformer.bind(model, optimizer)
    model[0].weight = torch.nn.Parameter(3 * model[0].weight.detach())
    optimizer.param_groups[0]["params"] = [model[0].weight]
    optimizer.step()
    assert model[0].weight.norm(dim=1).max() <= 1 + 1e-6


def test_frozen_parameters_are_not_projected():
    model = torch.nn.Sequential(Linear(8, 8), Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    antransformer.bind(model, optimizer)
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        for module in model:
            module.weight.mul_(3)
    optimizer.step()
    assert model[0].weight.norm(dim=1).min() > 2.9 and model[1].weight.norm(dim=1).max() <= 1 + 1e-6
    model[0].weight.requires_grad_(True)
    optimizer.step()
    assert model[0].weight.norm(dim=1).max() <= 1 + 1e-6


def test_a_tied_weight_is_projected_once(monkeypatch):
    model = torch.nn.Sequential(antransformer.nn.Embedding(16, 8), antransformer.nn.Head(8, 16))
    model[1].weight = model[0].weight
    projected = []
    monkeypatch.setattr(bounds, "project_", lambda found: projected.extend(found))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    antransformer.bind(model, optimizer)
    optimizer.step()
    assert len(projected) == 1 and projected[0].parameter is model[0].weight


def test_only_a_method_declares_bounds():
    model = torch.nn.Sequential(Linear(8, 8))
    model.bounds = torch.nn.Linear(8, 2)
    assert [bound.name for bound in bounds.collect_bounds(model)] == ["0.weight"]
    antransformer.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model.register_buffer("bounds", torch.zeros(2))
    assert antransformer.normalize_(model) is model


def test_a_method_with_arguments_does_not_declare_bounds():
    model = torch.nn.Sequential(Linear(8, 8))
    model.bounds = lambda x: x
    antransformer.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("nested", [False, True])
def test_a_method_bounds_may_be_a_generator_and_returns_bounds_only(nested):
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 8))

        def bounds(self):
            yield bounds.Bound("table", self.weight)

    table = Table()
    model = torch.nn.Sequential(table) if nested else table
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    antransformer.bind(model, optimizer)
    optimizer.step()
    assert table.weight.norm(dim=1).max() <= 1 + 1e-6
    path = "0.bounds" if nested else "bounds"
    for wrong, kind in (([("table", table.weight)], "tuple"), (None, "NoneType")):
        table.bounds = lambda wrong=wrong: wrong
        with pytest.raises(TypeError, match=rf"^{path}.*Table.*{kind}"):
            antransformer.bind(model, optimizer)
    table.bounds = [bounds.Bound("table", table.weight)]
    with pytest.raises(TypeError, match=rf"^{path}.*Table"):
        antransformer.bind(model, optimizer)


@pytest.mark.parametrize(
    "declare",
    [
        lambda weight: bounds.Bound("w", weight[0]),
        lambda weight: bounds.Bound("w", weight, axis=2),
        lambda weight: bounds.Bound("w", weight, axis=(0, 1)),
    ],
)
def test_a_declared_bound_that_cannot_hold_is_refused(declare):
    model = torch.nn.Linear(8, 8)
    model.bounds = lambda: [bounds.Bound("good", model.weight), declare(model.weight)]
    with pytest.raises(ValueError, match="w"):
        antransformer.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_computed_weight_is_refused():
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(Linear(8, 8)), Linear(8, 8))
    with pytest.raises(TypeError, match=r"^0\.weight.*Linear"):
        antransformer.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))
