"""Speed and memory of training steps: forward, backward, optimizer and bounds.

Every variant has its own model, loss and optimizer (``benchmarks.models``); all train on the same tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antransformer.benchmarks.models import TrainingSetup, build_variants
from antransformer.benchmarks.settings import (
    DOCUMENT_TOKENS,
    END_OF_TEXT,
    MASKED_VARIANTS,
    VARIANTS,
    Mode,
    Settings,
    require_distinct,
    require_positive,
)
from antransformer.benchmarks.timing import Benchmark, Row, alternate, make_rows, peak_memory, quartiles, time_call
from antransformer.errors import ConfigError
from antransformer.training import profiling
from antransformer.training.cost_model.throughput import flops_per_token, peak_flops
from antransformer.training.device import autocast


@dataclass(frozen=True, kw_only=True)
class StepSettings(Settings):
    """Settings of ``bench_step``; sequences have the length of the model's context.

    Attributes:
        variants: names from ``VARIANTS`` and ``MASKED_VARIANTS``; the first is the baseline.
        batch: number of sequences in a step.
        modes: eager execution, ``torch.compile``, or both.
        profile: folder for a trace of one step of each variant, or None.

    Raises:
        ConfigError: a variant is unknown or given twice, or a number is less than 1.
    """

    variants: tuple[str, ...] = VARIANTS
    batch: int = 8
    modes: tuple[Mode, ...] = ("eager",)
    profile: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(batch=self.batch)
        require_distinct(variants=self.variants)
        for name in self.variants:
            if name not in (*VARIANTS, *MASKED_VARIANTS):
                raise ConfigError(f"unknown variant {name!r}: choose from {', '.join((*VARIANTS, *MASKED_VARIANTS))}")

    def facts(self, baseline: str) -> dict[str, Any]:
        """Settings that a benchmark of steps reports."""
        return {"model": self.model.mapping(), "batch": self.batch, "dtype": str(self.dtype), "baseline": baseline}


def bench_step(settings: StepSettings, log: Callable[[str], None]) -> Benchmark:
    """Time training steps of all variants in every mode; ``log`` receives progress and skipped variants."""
    setups, problems = build_variants(settings.variants, settings.model, settings.device, log)
    rows = [row for mode in settings.modes for row in _time_mode(setups, problems, settings, mode, log)]
    return Benchmark("step", settings.facts(rows[0].variant), rows)


def _time_mode(
    setups: dict[str, TrainingSetup],
    problems: dict[str, str],
    settings: StepSettings,
    mode: Mode,
    log: Callable[[str], None],
) -> Iterator[Row]:
    log(f"{mode}: {', '.join(setups)}")
    setups = in_mode(setups, mode)
    steps = {name: make_step(setup, settings) for name, setup in setups.items()}
    # The matrix product takes part in the alternation, so that utilization refers to the same clock rate.
    calls = {**steps, "matmul": _matmul(settings)}
    timers = {name: partial(time_call, call, settings.device) for name, call in calls.items()}
    parts, failed = alternate(timers, settings.rounds, log)
    times = parts["total"]
    peaks = _attainable_flops(times.pop("matmul"), settings)
    tokens = settings.batch * settings.model.context
    flops = tokens * flops_per_token(settings.model)
    for row in make_rows({"mode": mode}, times, tokens, problems={**problems, **failed}):
        if row.problem:
            yield row
            continue
        utilization = quartiles([flops / time / peak for time, peak in zip(row.seconds, peaks, strict=True)])
        memory = peak_memory(steps[row.variant], settings.device) + state_bytes(setups[row.variant])
        if settings.profile:
            profiling.profile_call(steps[row.variant], settings.profile / f"{mode}-{row.variant}.json", log)
        yield replace(row, memory=memory, utilization=utilization)


def in_mode(setups: dict[str, TrainingSetup], mode: Mode) -> dict[str, TrainingSetup]:
    """Training setups whose losses are compiled in mode ``compiled``."""
    if mode == "eager":
        return setups
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # all our models share one code object, and each recompiles it
    return {name: setup._replace(loss=torch.compile(setup.loss, dynamic=False)) for name, setup in setups.items()}


def make_step(setup: TrainingSetup, settings: StepSettings) -> Callable[[], None]:
    """Function that performs one training step, always on the same random tokens in documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.model.context + 1)
    tokens = torch.randint(settings.model.vocab_size, shape, generator=generator)
    tokens[torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS] = END_OF_TEXT
    tokens = tokens.to(settings.device)

    def step() -> None:
        with autocast(settings.device, settings.dtype):
            loss = setup.loss(tokens)
        loss.backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()

    return step


def state_bytes(setup: TrainingSetup) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    tensors = [*setup.model.parameters(), *setup.model.buffers()]
    tensors += [value for state in setup.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors)


def _matmul_size(settings: StepSettings) -> int:
    """Rows and columns of the matrices whose product estimates the attainable FLOP/s; it must take milliseconds."""
    return 1024 if settings.device.type == "cpu" else 8192


def _matmul(settings: StepSettings) -> Callable[[], Tensor]:
    size = _matmul_size(settings)
    a, b = torch.randn(2, size, size, device=settings.device, dtype=settings.dtype)
    return lambda: a @ b


def _attainable_flops(matmul_seconds: list[float], settings: StepSettings) -> list[float]:
    """Attainable FLOP/s in each round: from the data sheet, or measured by a matrix product if that is unknown."""
    peak = peak_flops(settings.device, settings.dtype)
    return [peak or 2 * _matmul_size(settings) ** 3 / seconds for seconds in matmul_seconds]
