"""How long a sweep will take: a few real steps of every size, and arithmetic."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from antransformer.benchmarks.timing import now
from antransformer.comparison.experiment import LINES
from antransformer.data import Dataset
from antransformer.diagnostics.probes import PROBE_TOKENS
from antransformer.runs.queue import cores, steps_tokens
from antransformer.settings import Count
from antransformer.sweeps.sweep import Cell, Sweeper
from antransformer.training.config import TrainConfig
from antransformer.training.dry_run import dry_run_trainer

STEPS = 3  # timed, after one that is not
CPU_TOKENS = 8192  # of such a step on a CPU, whose speed a larger batch hardly changes
FORWARD = 1 / 3  # of a step is its forward pass, all that validation and probes need
START_SECONDS = 5.0  # a process begins and loads torch; measured on a CPU


@dataclass(frozen=True)
class Estimate:
    """What is still to be done, without and with the most that edges may add.

    Attributes:
        runs, tokens, hours: at least and at most.
    """

    runs: tuple[int, int]
    tokens: tuple[int, int]
    hours: tuple[float, float]


def estimate(sweeper: Sweeper, say: Callable[[str], None]) -> Estimate:
    """Measure and reckon; nothing is written.

    Args:
        sweeper: what is to be run.
        say: called with a line before each size is timed, which takes minutes where it is large.

    Raises:
        ConfigError, DataError: as ``Queue.finished``, of a folder that holds other runs.
    """
    missing = {cell: counts for cell in sweeper.plan.grids if any(counts := sweeper.missing(cell))}
    speeds = _speeds(sweeper, list(missing), say)
    ends = [_total(sweeper, {cell: counts[end] for cell, counts in missing.items()}, speeds) for end in (0, 1)]
    runs, tokens, hours = zip(*ends, strict=True)
    return Estimate(runs, tokens, hours)


def _total(
    sweeper: Sweeper, runs: Mapping[Cell, int], speeds: Mapping[tuple[str, str], float]
) -> tuple[int, int, float]:
    """Runs, tokens and hours; devices share the work, but no run is divided."""
    tokens, seconds, longest = 0, 0.0, 0.0
    for cell, number in runs.items():
        config = sweeper.config(cell, sweeper.plan.grids[cell][0], 0)
        tokens += number * steps_tokens(config)
        looked_at = FORWARD * (config.eval_tokens + LINES * PROBE_TOKENS)
        one = START_SECONDS + (steps_tokens(config) + looked_at) * speeds[cell.architecture, cell.size]
        seconds, longest = seconds + number * one, max(longest, one)
    return sum(runs.values()), tokens, max(seconds / len(sweeper.queue.devices), longest) / 3600


def _speeds(sweeper: Sweeper, cells: Sequence[Cell], say: Callable[[str], None]) -> dict[tuple[str, str], float]:
    """Seconds a token, of each architecture and size, with the smallest batch."""
    smallest: dict[tuple[str, str], Cell] = {}
    for cell in sorted(cells, key=lambda cell: -cell.batch):
        smallest[cell.architecture, cell.size] = cell
    speeds = {}
    with worker_threads(len(sweeper.queue.devices)):
        for key, cell in smallest.items():
            say(f"timing {STEPS} steps: {' '.join(key)}")
            config = sweeper.config(cell, sweeper.plan.grids[cell][0], 0)
            speeds[key] = seconds_per_token(config, sweeper.dataset, sweeper.queue.devices[0])
    return speeds


def seconds_per_token(config: TrainConfig, dataset: Dataset, device: str) -> float:
    """Median of a few training steps."""
    batch: int = config.batch_tokens
    if torch.device(device).type == "cpu":
        batch = min(batch, max(1, CPU_TOKENS // config.model.context) * config.model.context)
    trainer = dry_run_trainer(replace(config, device=device, batch_tokens=Count(batch)), dataset)
    times = []
    for step in range(STEPS + 1):
        started = now(trainer.device)
        trainer.update(step + 1)
        times.append(now(trainer.device) - started)
    return statistics.median(times[1:]) / batch


@contextmanager
def worker_threads(workers: int) -> Iterator[None]:
    """As many threads as a worker has, while entered."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
