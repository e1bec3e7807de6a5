"""Estimates of the runs, tokens and hours that an experiment needs, from a few timed steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

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

    def run_seconds(self, name: str, config: TrainConfig) -> float:
        """Expected seconds of a run; runs of one ``name`` are as fast per token.

        Raises:
            ConfigError: a step does not fit into the memory of the GPU.
        """
        if name not in self.speeds:
            self.log(f"timing {STEPS} steps: {name}")
            device, *others = self.queue.devices
            timed = fit_default_micro_batch(replace(config, device=device), 1 + others.count(device))
            with worker_threads(1 + len(others)):
                self.speeds[name] = seconds_per_token(timed, self.dataset)
        evaluated = FORWARD * (config.eval_tokens + METRICS_LINES * PROBE_TOKENS)
        return START_SECONDS + (tokens_of(config) + evaluated) * self.speeds[name]

    def hours(self, seconds: float, longest: float) -> float:
        """Hours of runs with these seconds in total. Each run is on one device, so the longest run is a lower limit."""
        return max(seconds / len(self.queue.devices), longest) / 3600


@contextmanager
def worker_threads(workers: int) -> Iterator[None]:
    """Limit this process to the threads that each of ``workers`` processes gets, for a fair timing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_per_worker(workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
