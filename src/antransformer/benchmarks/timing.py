"""Benchmarks: variants timed side by side, in alternation within one process.

On a machine that does other things too, or whose clock follows its temperature, a time drifts by tens of percent within
minutes. Variants that take turns drift together: of a comparison, the ratio within each round is what can be trusted,
and its quartiles over rounds say how far.
"""

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch

from antransformer.training.profiling import quiet

Mode = Literal["eager", "compiled"]
Times = dict[str, dict[str, list[float]]]  # part of the work -> variant -> seconds, one a round


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over rounds."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Row:
    """One variant at one task.

    Attributes:
        task: what was timed, by the name of each of its choices, such as {"batch": 16, "part": "decode"}.
        variant: its name.
        seconds: of each round.
        speed: units of work a second.
        ratio: this speed over that of the baseline in the same round.
        memory: bytes in use at the peak, where that was measured.
        utilization: share of the device's speed that was used, where that is known.
        waiting: share of the time that was spent waiting for data, where that was measured.
    """

    task: dict[str, Any]
    variant: str
    seconds: list[float]
    speed: Quartiles
    ratio: Quartiles
    memory: int | None = None
    utilization: Quartiles | None = None
    waiting: Quartiles | None = None


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least one value; between two values they are interpolated."""
    low, median, high = statistics.quantiles([*values, *values[:1]][: max(2, len(values))], n=4, method="inclusive")
    return Quartiles(low, median, high)


def alternate(variants: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> Times:
    """Let all variants take turns, after one turn each that does not count.

    Args:
        variants: by name; a call does the work once and returns the seconds of each part of it.
        rounds: how many times, each in an order of its own: what one leaves in caches and memory is found by the next,
            which should not always be the same.
    """
    for call in variants.values():
        call()
    times: Times = {}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(variants), len(variants)):
            for part, seconds in variants[name]().items():
                times.setdefault(part, {other: [] for other in variants})[name].append(seconds)
    return times


def compare(task: Mapping[str, Any], seconds: Mapping[str, list[float]], amount: float, baseline: str) -> list[Row]:
    """A row for each variant.

    Args:
        task: what was timed.
        seconds: of each variant, round by round.
        amount: units of work in each time.
        baseline: the variant that the others are compared with.
    """
    return [
        Row(
            task=dict(task),
            variant=name,
            seconds=times,
            speed=quartiles([amount / time for time in times]),
            ratio=quartiles([base / time for base, time in zip(seconds[baseline], times, strict=True)]),
        )
        for name, times in seconds.items()
    ]


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given.

    With one thread of a CPU the clock is the time that this process has had of it: the same where nothing else runs,
    and where something does, its turns do not count.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """How long a call takes."""
    started = now(device)
    call()
    return {"all": now(device) - started}


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call has allocated at its peak, over what was there when it began.

    On a CPU torch's profiler reports every allocation and release of tensors. That leaves out what libraries reserve
    for themselves, and what the process holds otherwise.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    quiet()
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
        call()
    events = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def machine(device: torch.device) -> dict[str, Any]:
    """What the times were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
