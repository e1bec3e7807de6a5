"""Timing of variants in alternation, and the results of benchmarks.

Clock rate, temperature and other processes change the speed of a machine by tens of percent within minutes. Variants
timed in alternation are affected equally. Only the ratio within a round is therefore reliable, and its quartiles over
rounds show its uncertainty.
"""

import contextlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any

import torch

from antransformer.training.profiling import silence_profiler

Times = dict[str, dict[str, list[float]]]  # part of the work -> variant -> seconds of each round
PACKAGES = ("torch", "transformers", "x-transformers", "nGPT-pytorch", "tokenizers")


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over rounds."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Row:
    """Result of one variant at one task.

    Attributes:
        task: choices that define the task, such as {"batch": 16, "part": "decode"}.
        variant: name of the variant.
        seconds: time of each round.
        speed: units of work per second.
        ratio: speed divided by the speed of the baseline in the same round.
        memory: peak memory in bytes, if measured.
        utilization: fraction of the attainable FLOP/s, if measured.
        waiting: fraction of the time spent waiting for data, if measured.
    """

    task: dict[str, Any]
    variant: str
    seconds: list[float]
    speed: Quartiles
    ratio: Quartiles
    memory: int | None = None
    utilization: Quartiles | None = None
    waiting: Quartiles | None = None


@dataclass(frozen=True)
class Benchmark:
    """Results of one benchmark.

    Attributes:
        name: name of the benchmark.
        facts: settings and further results, ready for JSON.
        rows: results of all variants and tasks.
        unit: unit of ``Row.speed``.
    """

    name: str
    facts: dict[str, Any]
    rows: list[Row]
    unit: str = "tokens/s"

    def content(self, device: torch.device) -> dict[str, Any]:
        """Results as JSON types, with the machine and the versions of the libraries that were compared."""
        rows = [asdict(row) for row in self.rows]
        machine = {"machine": machine_info(device), "versions": installed_versions()}
        return {"benchmark": self.name, "unit": self.unit, **self.facts, **machine, "rows": rows}


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of one or more values, with linear interpolation."""
    low, median, high = statistics.quantiles([*values, *values[:1]][: max(2, len(values))], n=4, method="inclusive")
    return Quartiles(low, median, high)


def alternate(variants: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> Times:
    """Time all variants in alternation, after one uncounted warm-up call each.

    Args:
        variants: functions by name; each does the work once and returns the seconds of each part of it.
        rounds: number of timings. Each round has its own random order, because a variant affects the caches and memory
            that the next one starts with.
    """
    for call in variants.values():
        call()
    times: Times = {}
    for round_number in range(rounds):
        for name in random.Random(round_number).sample(list(variants), len(variants)):
            for part, seconds in variants[name]().items():
                times.setdefault(part, {variant: [] for variant in variants})[name].append(seconds)
    return times


def make_rows(task: Mapping[str, Any], times: Mapping[str, list[float]], amount: float, baseline: str) -> list[Row]:
    """Rows of all variants at one task.

    Args:
        task: choices that define the task.
        times: seconds of each round, by variant.
        amount: units of work done in each time.
        baseline: variant that ratios refer to.
    """
    return [
        Row(
            task=dict(task),
            variant=name,
            seconds=seconds,
            speed=quartiles([amount / time for time in seconds]),
            ratio=quartiles([base / time for base, time in zip(times[baseline], seconds, strict=True)]),
        )
        for name, seconds in times.items()
    ]


def now(device: torch.device) -> float:
    """Time in seconds, after waiting for all work submitted to the device.

    With one CPU thread it is the CPU time of this process, which excludes time taken by other processes.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def time_call(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of one call, under the key ``total``."""
    started = now(device)
    call()
    return {"total": now(device) - started}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call in bytes, in addition to the memory allocated before it.

    On a CPU, the sum of all tensors that torch's profiler reports; other memory of the process is not included.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    silence_profiler()
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
        call()
    events = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def machine_info(device: torch.device) -> dict[str, Any]:
    """Device, processor, number of threads and version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def installed_versions() -> dict[str, str]:
    """Versions of those ``PACKAGES`` that are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
