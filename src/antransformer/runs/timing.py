"""Estimates of the runs, tokens and hours that an experiment needs, from a few timed steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from antransformer.data import Dataset
from antransformer.diagnostics.probes import PROBE_TOKENS
from antransformer.pace import format_duration
from antransformer.runs.queue import RunQueue, threads_per_worker, tokens_of
from antransformer.runs.settings import METRICS_LINES
from antransformer.training.config import TrainConfig
from antransformer.training.dry_run import STEPS, seconds_per_token
from antransformer.training.micro_batch import fit_default_micro_batch
from antransformer.wording import counted

FORWARD = 1 / 3  # share of a training step that is its forward pass, which is all that validation and probes run
START_SECONDS = 5.0  # to start a process and import torch; measured on a CPU


@dataclass(frozen=True)
class Estimate:
    """Work that is left: the least that a search may need, and the most.

    Attributes:
        runs, tokens, hours: minimum and maximum.
    """

    runs: tuple[int, int]
    tokens: tuple[int, int]
    hours: tuple[float, float]

    def __str__(self) -> str:
        low, high = (
            f"{counted(runs, 'run')}, {tokens / 1e6:,.1f}M tokens, {format_duration(3600 * hours)}"
            for runs, tokens, hours in zip(self.runs, self.tokens, self.hours, strict=True)
        )
        return low if low == high else f"{low}; up to {high}, depending on the best values"


class RunCount(NamedTuple):
    """Number of runs of one kind; runs of a kind are as fast per token."""

    kind: str
    config: TrainConfig
    runs: int


class Timer:
    """Times steps of the runs of a queue, each kind of model once; writes no files.

    Args:
        queue: queue that will train the runs.
        dataset: verified data.
        log: called with a line before each timing, which takes minutes for a large model.
    """

    def __init__(self, queue: RunQueue, dataset: Dataset, log: Callable[[str], None]) -> None:
        self.queue, self.dataset, self.log = queue, dataset, log
        self.speeds: dict[str, float] = {}

    def estimate(self, ends: Sequence[Sequence[RunCount]]) -> Estimate:
        """Time each kind of run, and return the totals for the fewest runs and the most.

        Args:
            ends: the fewest runs, then the most.

        Raises:
            ConfigError: a step does not fit into the memory of the GPU.
        """
        runs, tokens, hours = zip(*map(self._total, ends), strict=True)
        return Estimate(runs, tokens, hours)

    def _total(self, counts: Sequence[RunCount]) -> tuple[int, int, float]:
        seconds = [self._run_seconds(kind, config) for kind, config, _ in counts]
        # Each run is on one device, so the longest run is a lower limit.
        shared = sum(one * runs for one, (*_, runs) in zip(seconds, counts, strict=True)) / len(self.queue.devices)
        tokens = sum(runs * tokens_of(config) for _, config, runs in counts)
        return sum(runs for *_, runs in counts), tokens, max([shared, *seconds]) / 3600

    def _run_seconds(self, name: str, config: TrainConfig) -> float:
        """Expected seconds of a run; runs of one ``name`` are as fast per token."""
        if name not in self.speeds:
            self.log(f"timing {STEPS} steps: {name}")
            device, *others = self.queue.devices
            timed = fit_default_micro_batch(replace(config, device=device), 1 + others.count(device))
            with worker_threads(1 + len(others)):
                self.speeds[name] = seconds_per_token(timed, self.dataset)
        evaluated = FORWARD * (config.eval_tokens + METRICS_LINES * PROBE_TOKENS)
        return START_SECONDS + (tokens_of(config) + evaluated) * self.speeds[name]


@contextmanager
def worker_threads(workers: int) -> Iterator[None]:
    """Limit this process to the threads that each of ``workers`` processes gets, for a fair timing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_per_worker(workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
