"""The speed of training: steps of forward, backward, optimizer and bound.

Every variant has its own model, loss and optimizer (``bench_models``), and all see the same tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from antransformer.benchmarks.models import TRAINEES, Trainee, make
from antransformer.benchmarks.timing import Mode, Row, alternate, compare, peak_memory, quartiles, seconds
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig
from antransformer.training import profiling
from antransformer.training.cost_model.throughput import flops_per_token, peak_flops
from antransformer.training.device import autocast

BASELINE = "gpt+"
PRODUCT = 1024  # rows and columns of the matrices whose product says what the device can do


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is timed.

    Attributes:
        model: the shape, and with its context the length of the sequences; each variant has its own architecture.
        variants: names among ``TRAINEES``; the first is the baseline.
        batch: number of sequences in a step.
        modes: as written, or through torch.compile.
        rounds: how many times each variant is timed.
        device: where.
        precision: of the matrix products; parameters are float32.
        profile: a folder for a trace of one step of each variant, or None.

    Raises:
        ConfigError: a variant is unknown.
    """

    model: ModelConfig
    variants: tuple[str, ...]
    batch: int
    modes: tuple[Mode, ...]
    rounds: int
    device: torch.device
    precision: torch.dtype
    profile: Path | None = None

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in TRAINEES:
                raise ConfigError(f"unknown variant {name!r}: choose from {', '.join(TRAINEES)}")


def bench_step(settings: Settings, note: Callable[[str], None]) -> list[Row]:
    """Time all variants in every mode; ``note`` is told what begins, and what is left out."""
    trainees = make(settings.variants, settings.model, settings.device, note)
    return [row for mode in settings.modes for row in timed(trainees, settings, mode, note)]


def timed(trainees: dict[str, Trainee], settings: Settings, mode: Mode, note: Callable[[str], None]) -> Iterator[Row]:
    """The rows of one mode."""
    note(f"{mode}: {', '.join(trainees)}")
    trainees = compiled(trainees, mode)
    calls = {name: steps(trainee, settings) for name, trainee in trainees.items()}
    timers = {name: partial(seconds, call, settings.device) for name, call in calls.items()}
    times = alternate({**timers, "product": partial(seconds, product(settings), settings.device)}, settings.rounds)[
        "all"
    ]
    peaks = attainable(times.pop("product"), settings)
    tokens = settings.batch * settings.model.context
    flops = tokens * flops_per_token(settings.model)
    for row in compare({"mode": mode}, times, tokens, next(iter(times))):
        shares = [flops / time / peak for time, peak in zip(row.seconds, peaks, strict=True)]
        memory = peak_memory(calls[row.variant], settings.device) + held(trainees[row.variant])
        if settings.profile:
            trace = settings.profile / f"{mode}-{row.variant}.json"
            profiling.of_call(calls[row.variant], trace, note)
        yield replace(row, memory=memory, utilization=quartiles(shares))


def compiled(trainees: dict[str, Trainee], mode: Mode) -> dict[str, Trainee]:
    """The trainees in this mode."""
    if mode == "eager":
        return trainees
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # all our models run the same code object
    return {name: it._replace(loss=torch.compile(it.loss, dynamic=False)) for name, it in trainees.items()}


def steps(trainee: Trainee, settings: Settings) -> Callable[[], None]:
    """What takes one training step on the same tokens each time."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.model.context + 1)
    tokens = torch.randint(settings.model.vocab_size, shape, generator=generator).to(settings.device)

    def step() -> None:
        with autocast(settings.device, settings.precision):
            loss = trainee.loss(tokens)
        loss.backward()
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()

    return step


def product(settings: Settings) -> Callable[[], Tensor]:
    """A large square matrix product, the fastest thing that there is."""
    one, other = torch.randn(2, PRODUCT, PRODUCT, device=settings.device, dtype=settings.precision)
    return lambda: one @ other


def attainable(times: list[float], settings: Settings) -> list[float]:
    """FLOP/s that the device could do in each round: the data sheet's, or else those of the product."""
    known = peak_flops(settings.device, settings.precision)
    return [known or 2 * PRODUCT**3 / time for time in times]


def held(trainee: Trainee) -> int:
    """Bytes of parameters and optimizer state."""
    tensors = [*trainee.model.parameters(), *trainee.model.buffers()]
    tensors += [value for state in trainee.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors)
