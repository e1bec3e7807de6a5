"""Speed of two parts of a training step: the loss after the last block, and the optimizer with the bounds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from antransformer import functional
from antransformer.benchmarks.settings import Settings, replace_architecture, require_positive
from antransformer.benchmarks.timing import Benchmark, Row, alternate, make_rows, peak_memory, time_call
from antransformer.bounds import bind
from antransformer.models import build
from antransformer.training.config import resolve_config
from antransformer.training.optimizer import make_optimizer

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (B, T, d), weight (V, d), targets (B, T) -> mean loss

UNCHUNKED = "unchunked"
OPTIMIZER, WITH_BOUNDS = "optimizer", "with bounds"


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Settings of ``bench_loss``; hidden states and weights have ``dtype``.

    Attributes:
        batch: number of sequences.
        vocab_sizes: vocabulary sizes to measure.

    Raises:
        ConfigError: a number is less than 1.
    """

    batch: int = 8
    vocab_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(batch=self.batch)


def losses() -> dict[str, Loss]:
    """Implementations of the cross-entropy of a linear head, by name."""
    implementations: dict[str, Loss] = {UNCHUNKED: _unchunked, "chunked": functional.cross_entropy}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and newer
        implementations["torch chunked"] = _torch_chunked
    return implementations


def bench_loss(settings: LossSettings, log: Callable[[str], None]) -> Benchmark:
    """Time the loss with its gradients on random hidden states, for each vocabulary size; ``log`` receives progress."""
    rows = [row for size in settings.vocab_sizes for row in _time_loss(settings, size, log)]
    model = settings.model
    facts = {"width": model.width, "context": model.context, "batch": settings.batch, "dtype": str(settings.dtype)}
    return Benchmark("loss", facts, rows)


def bench_optimizer(settings: Settings, log: Callable[[str], None]) -> Benchmark:
    """Time optimizer steps with and without bounds, on constant gradients; ``log`` receives progress."""
    rows = [row for architecture in ("angpt", "ngpt") for row in _time_optimizer(settings, architecture, log)]
    return Benchmark("optimizer", {"model": settings.model.mapping()}, rows, unit="parameters/s")


def _time_loss(settings: LossSettings, vocab_size: int, log: Callable[[str], None]) -> list[Row]:
    torch.manual_seed(0)
    model, device, dtype = settings.model, settings.device, settings.dtype
    shape = (settings.batch, model.context)
    hidden = torch.randn(*shape, model.width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, model.width, device=device, dtype=dtype)
    weight = (weight / model.width**0.5).requires_grad_()
    targets = torch.randint(vocab_size, shape, device=device)

    def gradients(loss: Loss) -> None:
        torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

    calls = {name: partial(gradients, loss) for name, loss in losses().items()}
    timers = {name: partial(time_call, call, device) for name, call in calls.items()}
    times, problems = alternate(timers, settings.rounds, log)
    rows = make_rows({"vocabulary": vocab_size}, times.get("total", {}), targets.numel(), UNCHUNKED, problems)
    return [row if row.problem else replace(row, memory=peak_memory(calls[row.variant], device)) for row in rows]


def _time_optimizer(settings: Settings, architecture: str, log: Callable[[str], None]) -> list[Row]:
    calls = {}
    for name in (OPTIMIZER, WITH_BOUNDS):
        torch.manual_seed(0)
        with settings.device:
            model = build(replace_architecture(settings.model, architecture))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) / parameter.numel() ** 0.5
        config = resolve_config({"recipe": "paper", "model": model.config.mapping()}, settings.model.vocab_size)
        optimizer = make_optimizer(model, config)
        if name == WITH_BOUNDS:
            bind(model, optimizer)
        calls[name] = partial(time_call, optimizer.step, settings.device)
    times, problems = alternate(calls, settings.rounds, log)
    return make_rows(
        {"architecture": architecture}, times.get("total", {}), model.parameter_count(), OPTIMIZER, problems
    )


def _unchunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss that materializes all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


def _torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunked loss of torch, which chooses the chunk size itself."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), options=options)
