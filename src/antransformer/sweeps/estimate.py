"""Estimate of the runs, tokens and hours that a sweep needs, from a few timed steps of every size."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from antransformer.benchmarks.timing import now
from antransformer.data import Dataset
from antransformer.diagnostics.probes import PROBE_TOKENS
from antransformer.runs.queue import available_cores, tokens_of
from antransformer.runs.settings import METRICS_LINES
from antransformer.settings import Count
from antransformer.sweeps.sweep import Cell, Sweeper
from antransformer.training.config import TrainConfig
from antransformer.training.dry_run import dry_run_trainer

STEPS = 3  # timed steps, after one that warms up
CPU_TOKENS = 8192  # largest batch of a timed step on a CPU, where larger batches are hardly faster per token
FORWARD = 1 / 3  # share of a training step that is its forward pass, which is all that validation and probes run
START_SECONDS = 5.0  # to start a process and import torch; measured on a CPU


@dataclass(frozen=True)
class Estimate:
    """Work that is left: without any extension of a grid, and with all of them.

    Attributes:
        runs, tokens, hours: minimum and maximum.
    """

    runs: tuple[int, int]
    tokens: tuple[int, int]
    hours: tuple[float, float]

    def __str__(self) -> str:
        low, high = (
            f"{runs:,} runs, {tokens / 1e6:,.1f}M tokens, {_duration(hours)}"
            for runs, tokens, hours in zip(self.runs, self.tokens, self.hours, strict=True)
        )
        return low if low == high else f"{low}; up to {high} if the best values are at the edges"


def _duration(hours: float) -> str:
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {math.ceil(60 * hours)} minutes"


def estimate(sweeper: Sweeper, log: Callable[[str], None]) -> Estimate:
    """Time a few steps of each size and compute what is left; writes no files.

    Args:
        sweeper: planned sweep.
        log: called with a line before each size is timed, which takes minutes for a large one.

    Raises:
        ConfigError, DataError: the folder holds other runs, as in ``RunQueue.finished``.
    """
    missing = {cell: counts for cell in sweeper.plan.grids if any(counts := sweeper.missing(cell))}
    speeds = _speeds(sweeper, list(missing), log)
    totals = [_total(sweeper, {cell: counts[end] for cell, counts in missing.items()}, speeds) for end in (0, 1)]
    runs, tokens, hours = zip(*totals, strict=True)
    return Estimate(runs, tokens, hours)


def _total(
    sweeper: Sweeper, runs: Mapping[Cell, int], speeds: Mapping[tuple[str, str], float]
) -> tuple[int, int, float]:
    """Runs, tokens and hours for a number of runs of each cell."""
    tokens, seconds, longest = 0, 0.0, 0.0
    for cell, count in runs.items():
        config = sweeper.config(cell, sweeper.plan.grids[cell][0], 0)
        tokens += count * tokens_of(config)
        evaluated = FORWARD * (config.eval_tokens + METRICS_LINES * PROBE_TOKENS)
        run_seconds = START_SECONDS + (tokens_of(config) + evaluated) * speeds[cell.architecture, cell.size]
        seconds, longest = seconds + count * run_seconds, max(longest, run_seconds)
    # Devices share the runs, but each run is on one device, so the sweep takes at least as long as its longest run.
    return sum(runs.values()), tokens, max(seconds / len(sweeper.queue.devices), longest) / 3600


def _speeds(sweeper: Sweeper, cells: Sequence[Cell], log: Callable[[str], None]) -> dict[tuple[str, str], float]:
    """Seconds per token of each architecture and size, with the smallest batch."""
    smallest: dict[tuple[str, str], Cell] = {}
    for cell in sorted(cells, key=lambda cell: -cell.batch):
        smallest[cell.architecture, cell.size] = cell
    speeds = {}
    with worker_threads(len(sweeper.queue.devices)):
        for key, cell in smallest.items():
            log(f"timing {STEPS} steps: {' '.join(key)}")
            config = sweeper.config(cell, sweeper.plan.grids[cell][0], 0)
            speeds[key] = seconds_per_token(config, sweeper.dataset, sweeper.queue.devices[0])
    return speeds


def seconds_per_token(config: TrainConfig, dataset: Dataset, device: str) -> float:
    """Median seconds per token of a few training steps; on a CPU with a batch of at most ``CPU_TOKENS``."""
    batch: int = config.batch_tokens
    if torch.device(device).type == "cpu":
        batch = min(batch, max(1, CPU_TOKENS // config.model.context) * config.model.context)
    trainer = dry_run_trainer(replace(config, device=device, batch_tokens=Count(batch)), dataset)
    seconds = []
    for step in range(STEPS + 1):
        started = now(trainer.device)
        trainer.update(step + 1)
        seconds.append(now(trainer.device) - started)
    return statistics.median(seconds[1:]) / batch


@contextmanager
def worker_threads(workers: int) -> Iterator[None]:
    """Limit this process to the threads that each of ``workers`` processes gets, for a fair timing."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, available_cores() // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
