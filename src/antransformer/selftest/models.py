"""Models on the device: eager against compiled and against the CPU, bounds, drift in bfloat16, folded generation."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from antransformer.bounds import bind, collect_bounds, norms
from antransformer.functional import attention
from antransformer.inference import fold
from antransformer.inference.sampling import generate
from antransformer.models import Decoder, ModelConfig, build
from antransformer.selftest.checks import (
    Check,
    Setup,
    at_most,
    equal,
    largest,
    only_on_cuda,
    relative_error,
    triton_kernels,
)
from antransformer.training.config import resolve_config
from antransformer.training.device import autocast
from antransformer.training.optimizer import make_optimizer

CPU = torch.device("cpu")
BOUNDED = ("angpt", "ngpt")
EACH_GRADIENT = 1e-2  # largest relative error of the gradient of any parameter, in float32


class Outputs(NamedTuple):
    """Logits (B, T, V) and the gradients of all parameters."""

    logits: Tensor
    gradients: list[Tensor]


def outputs(setup: Setup, name: str) -> Iterator[Check]:
    """Logits and gradients of an architecture: on the CPU, eager, compiled, and in bfloat16."""
    if setup.miniature and name != "angpt":  # compiling takes a while
        yield only_on_cuda(f"{name}, logits and gradients")
        return
    config = small_model(setup, name)
    tokens = synthetic_tokens(config, 2, seed=0)
    expected = _outputs(config, tokens, CPU)
    eager = _outputs(config, tokens, setup.device)
    yield from _compare(f"{name}, eager against CPU", eager, expected, 1e-4, 1e-3)
    torch.compiler.reset()
    compiled = _outputs(config, tokens, setup.device, compiled=True)
    yield from _compare(f"{name}, compiled against eager", compiled, eager, 1e-4, 1e-3)
    half = _outputs(config, tokens, setup.device, compiled=True, precision=torch.bfloat16)
    yield from _compare(f"{name}, bfloat16 against float32", half, eager, 5e-2, 5e-2)


def masked_queries(setup: Setup) -> Iterator[Check]:
    """A query without a visible key gives 0, and its gradients are finite."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 64, 2, 64).to(setup.device, dtype).requires_grad_().unbind()
        mask = torch.ones(64, 64, dtype=torch.bool, device=setup.device)
        mask[5] = False
        y = attention(q, k, v, mask=mask)
        gradients = torch.autograd.grad(y.float().square().sum(), (q, k, v))
        kind = str(dtype).removeprefix("torch.")
        yield at_most(f"query without a visible key, {kind}: output", y[:, 5].abs().max().item(), 0.0)
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        yield equal(f"query without a visible key, {kind}: finite gradients", finite)


def documents(setup: Setup) -> Iterator[Check]:
    """Logits and gradients with documents kept apart (FlexAttention on a GPU): eager and compiled, against the CPU."""
    config = small_model(setup, "angpt")
    tokens = synthetic_tokens(config, 2, seed=0)
    tokens[0, :: config.context // 5] = tokens[1, config.context // 2] = 0
    expected = _outputs(config, tokens, CPU, end_of_text=0)
    for compiled in (False,) if setup.miniature else (False, True):
        result = _outputs(config, tokens, setup.device, compiled, end_of_text=0)
        label = f"documents apart, {'compiled' if compiled else 'eager'} against CPU"
        yield from _compare(label, result, expected, 1e-4, 1e-3)
    half = _outputs(config, tokens, setup.device, precision=torch.bfloat16, end_of_text=0)
    yield from _compare("documents apart, bfloat16 against CPU", half, expected, 5e-2, 5e-2)


def bounds(setup: Setup, name: str) -> Iterator[Check]:
    """Bounds of an architecture after 50 steps, with the Triton kernels and without them."""
    losses = []
    for fused in (True, False):
        with triton_kernels(fused):
            run = _train(small_model(setup, name), setup.device, 50)
        label = f"{name}, {'with' if fused else 'without'} kernels, 50 steps"
        yield at_most(f"{label}: largest excess of a bounded norm", _excess(run.model), 1e-6)
        losses.append(run.losses[-1])
    yield at_most(f"{name}: difference of the losses", abs(losses[0] - losses[1]), 1e-3)


def drift(setup: Setup, name: str) -> Iterator[Check]:
    """100 steps of an architecture, in bfloat16 compiled against float32: bounds, norm of the residual stream, loss."""
    label = f"{name}, bfloat16 compiled, 100 steps"
    if setup.miniature and name != "ngpt":
        yield only_on_cuda(label)
        return
    config = small_model(setup, name)
    exact = _train(config, setup.device, 100)
    torch.compiler.reset()
    half = _train(config, setup.device, 100, compiled=True, precision=torch.bfloat16)
    yield at_most(f"{label}: largest excess of a bounded norm", _excess(half.model), 1e-6)
    lengths = [_stream_norm(run.model, synthetic_tokens(config, 2, seed=1)) for run in (half, exact)]
    yield at_most(f"{label}: relative change of the stream's norm", abs(lengths[0] / lengths[1] - 1), 1e-2)
    differences = [abs(a - b) for a, b in zip(half.losses[-10:], exact.losses[-10:], strict=True)]
    yield at_most(f"{label}: largest difference of the last 10 losses", largest(differences), 2e-2)


def folded(setup: Setup) -> Iterator[Check]:
    """Greedy text of a model that was trained for 50 steps, and of the same model folded."""
    config = small_model(setup, "angpt")
    model = _train(config, setup.device, 50).model.eval()
    flat = fold(model).eval()
    prompts = synthetic_tokens(config, 4, seed=2)[:, :8].tolist()
    with torch.no_grad():
        tokens = synthetic_tokens(config, 2, seed=3)[:, :-1].to(setup.device)
        yield at_most("folded: error of the logits", relative_error(flat(tokens), model(tokens)), 1e-4)
        texts = [list(generate(each, prompts, max_new_tokens=16, temperature=0.0)) for each in (model, flat)]
    yield equal("folded: greedy text of 4 prompts", texts[0] == texts[1])


def small_model(setup: Setup, architecture: str) -> ModelConfig:
    """Model that any device trains in seconds; on a GPU with sizes that fill its units."""
    if setup.miniature:
        return setup.model("nano", architecture)
    return ModelConfig(architecture=architecture, vocab_size=1009, width=256, layers=4, context=256, head_dim=64)


def synthetic_tokens(config: ModelConfig, batch: int, seed: int) -> Tensor:
    """Learnable token ids (batch, context + 1): a random walk with three kinds of steps, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(3, (batch, config.context + 1), generator=generator)
    start = torch.randint(config.vocab_size, (batch, 1), generator=generator)
    return (start + steps.cumsum(1)) % config.vocab_size


class Run(NamedTuple):
    """A trained model and the loss of each step."""

    model: Decoder
    losses: list[float]


def _train(
    config: ModelConfig,
    device: torch.device,
    steps: int,
    compiled: bool = False,
    precision: torch.dtype = torch.float32,
) -> Run:
    torch.manual_seed(0)
    model = build(config).to(device)
    settings = resolve_config({"recipe": "paper", "model": config.mapping()}, config.vocab_size)
    optimizer = make_optimizer(model, settings)
    bind(model, optimizer)
    loss: Callable[[Tensor, Tensor], Tensor] = torch.compile(model.loss) if compiled else model.loss
    losses = []
    for seed in range(steps):
        tokens = synthetic_tokens(config, 8, seed).to(device)
        with autocast(device, precision):
            value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return Run(model, torch.stack(losses).tolist())


def _outputs(
    config: ModelConfig,
    tokens: Tensor,
    device: torch.device,
    compiled: bool = False,
    precision: torch.dtype = torch.float32,
    end_of_text: int | None = None,
) -> Outputs:
    torch.manual_seed(0)
    model = build(config).to(device)
    model.end_of_text = end_of_text
    tokens = tokens.to(device)

    def logits_and_loss(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return model(tokens[:, :-1]), model.loss(tokens[:, :-1], tokens[:, 1:])

    call = torch.compile(logits_and_loss) if compiled else logits_and_loss
    with autocast(device, precision):
        logits, loss = call(tokens)
    loss.backward()
    return Outputs(logits, [parameter.grad for parameter in model.parameters() if parameter.grad is not None])


def _compare(name: str, result: Outputs, expected: Outputs, logits: float, gradient: float) -> Iterator[Check]:
    yield at_most(f"{name}: error of the logits", relative_error(result.logits, expected.logits), logits)
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(result.gradients, expected.gradients, strict=True)]
    differences = torch.stack([(a - b).norm() for a, b in pairs])
    sizes = torch.stack([b.norm() for _, b in pairs])
    error = float(differences.norm() / sizes.norm())
    yield at_most(f"{name}: relative error of the gradient", error, gradient)
    if gradient < EACH_GRADIENT:  # in float32; the gradient of a score scale is less than 1e-4 of the whole
        errors = differences / sizes.clamp_min(1e-30)
        yield at_most(f"{name}: relative error of a parameter's gradient", float(errors.max()), EACH_GRADIENT)


def _excess(model: Decoder) -> float:
    """Largest excess of a bounded norm over 1; for strict bounds, largest deviation from 1."""
    differences = [(bound.strict, norms(bound).detach().double() - 1) for bound in collect_bounds(model)]
    return largest([0.0, *(float((size.abs() if strict else size).max()) for strict, size in differences)])


def _stream_norm(model: Decoder, tokens: Tensor) -> float:
    """Mean norm of the residual stream after the last block, in float32."""
    with torch.no_grad():
        hidden = model.hidden(tokens[:, :-1].to(model.embedding.weight.device))
    return float(torch.linalg.vector_norm(hidden.float(), dim=-1).mean())
