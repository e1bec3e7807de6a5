"""Timing of variants in alternation, and the results of benchmarks.

Clock rate, temperature and other processes change the speed of a machine by tens of percent within minutes. Variants
timed in alternation are affected equally. Only the ratio within a round is therefore reliable, and its quartiles over
rounds show its uncertainty.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch

from antransformer.errors import MachineError
from antransformer.pace import Pace
from antransformer.training.device import cpu_name
from antransformer.training.profiling import silence_profiler

Times = dict[str, dict[str, list[float]]]  # part of the work -> variant -> seconds of each round
PACKAGES = ("torch", "triton", "transformers", "x-transformers", "nGPT-pytorch", "tokenizers")
GPU_REPEATS = 3  # calls in a row


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
        speed: units of work per second, or None for a variant that failed.
        ratio: speed divided by the speed of the baseline in the same round, or None for a variant that failed.
        memory: peak memory in bytes, if measured.
        utilization: fraction of the attainable FLOP/s, if measured.
        waiting: fraction of the time spent waiting for data, if measured.
        problem: reason why there are no measurements, or None.
    """

    task: dict[str, Any]
    variant: str
    seconds: list[float]
    speed: Quartiles | None
    ratio: Quartiles | None
    memory: int | None = None
    utilization: Quartiles | None = None
    waiting: Quartiles | None = None
    problem: str | None = None


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


def alternate(
    variants: Mapping[str, Callable[[], Mapping[str, float]]],
    rounds: int,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[Times, dict[str, str]]:
    """Time all variants in alternation, after one uncounted warm-up call each.

    Args:
        variants: functions by name; each does the work once and returns the seconds of each part of it.
        rounds: number of timings. Each round has its own random order, because a variant affects the caches and memory
            that the next one starts with.
        log: called with an estimate and lines of progress.

    Returns:
        Times of the variants that work, and the reasons of those that raise.
    """
    problems: dict[str, str] = {}
    times: dict[str, list[Mapping[str, float]]] = {name: [] for name in variants}
    pace, total = Pace("timing", "calls", log), (rounds + 1) * len(variants)
    for round_number in range(rounds + 1):
        names = list(variants)
        order = random.Random(round_number - 1).sample(names, len(names)) if round_number else names
        for position, name in enumerate(order, start=1):
            if name in problems:
                continue
            try:
                times[name].append(variants[name]())
            except Exception as error:  # a library may raise anything, and the other variants can still be timed
                problems[name] = describe_error(error)
                log(f"{name} failed: {problems[name]}")
            pace(round_number * len(names) + position, total)
    working = {name: rows[1:] for name, rows in times.items() if name not in problems}
    parts = next(iter(working.values()), [{}])[0]
    return {part: {name: [row[part] for row in rows] for name, rows in working.items()} for part in parts}, problems


def describe_error(error: Exception) -> str:
    """Class and first line of an error."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def make_rows(
    task: Mapping[str, Any],
    times: Mapping[str, list[float]],
    amount: float,
    baseline: str | None = None,
    problems: Mapping[str, str] = MappingProxyType({}),
    strict: bool = True,
) -> list[Row]:
    """Rows of all variants at one task.

    Args:
        task: choices that define the task.
        times: seconds of each round, by variant.
        amount: units of work done in each time.
        baseline: variant that ratios refer to; by default, and if it failed, the first.
        problems: reasons of the variants without times.
        strict: whether at least one variant must have times.

    Raises:
        MachineError: no variant has times, and ``strict``.
    """
    if not times and strict:
        raise MachineError("; ".join(f"{name} failed: {problem}" for name, problem in problems.items()))
    base_times = times.get(baseline or "") or next(iter(times.values()), [])
    return [
        *(
            Row(
                task=dict(task),
                variant=name,
                seconds=seconds,
                speed=quartiles([amount / time for time in seconds]),
                ratio=quartiles([base / time for base, time in zip(base_times, seconds, strict=True)]),
            )
            for name, seconds in times.items()
        ),
        *(Row(dict(task), name, [], None, None, problem=problem) for name, problem in problems.items()),
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
    """Seconds of a call, under the key ``total``.

    On a GPU it is the mean of a few calls in a row, as training does not wait for the device after each step.
    """
    repeats = 1 if device.type == "cpu" else GPU_REPEATS
    started = now(device)
    for _ in range(repeats):
        call()
    return {"total": (now(device) - started) / repeats}


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
    peak: int = max(accumulate((size for _, size in changes), initial=0))
    return peak


def machine_info(device: torch.device) -> dict[str, Any]:
    """Device, processor, number of threads and version of torch; on a GPU also the versions of CUDA and cuDNN."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    info = {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":  # on which torch's choice of an attention kernel depends
        info |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return info


def installed_versions() -> dict[str, str]:
    """Versions of those ``PACKAGES`` that are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
