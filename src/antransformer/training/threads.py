"""CPU threads and memory of a run: as many threads as other processes leave room for, and memory that is used again.

The threads of a matrix product wait for each other without releasing their cores. Where another process has taken one
of the cores, the product waits for the thread that does not run, and training slows down to a small fraction. With a
thread less it keeps most of its speed (docs/speed.md).

A number that the user chose (``OMP_NUM_THREADS``) is kept. Where /proc/stat does not exist, which is everywhere but on
Linux, no number changes.

A compiled model is compiled again for every other number of threads, once for each. This took half a minute for a small
model, so the first change waits until other work has lasted for twice that time. Only three numbers are used, since
torch compiles a function at most eight times, and training and validation are compiled separately.
"""

import contextlib
import ctypes
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

INTERVAL = 2.0  # seconds between two readings
AGREEING = 2  # readings before a change, since others that work for a moment should not change anything
SECONDS_TO_COMPILE = 60.0  # of agreeing readings, before a change that compiles the model again
MARGIN = 0.5  # cores that others may use beyond the free ones before a thread is taken away
STATISTICS = Path("/proc/stat")
CLOCK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

# Parameters of glibc's mallopt, and the largest values that it takes.
MALLOC_OPTIONS = {"MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30), "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1)}


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep the memory of freed tensors on a CPU for later ones, in the whole process.

    By default it returns large blocks to the system, which clears their pages for the next tensor. Every step frees and
    allocates the same tensors, so this took up to 18% of the time of a step (docs/speed.md). Environment variables of
    the user with these options take precedence. Other C libraries are left as they are.
    """
    if device.type != "cpu" or sys.platform != "linux" or any(name in os.environ for name in MALLOC_OPTIONS):
        return
    with contextlib.suppress(AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOC_OPTIONS.values():
            mallopt(option, value)


class Reading(NamedTuple):
    """Seconds of wall time, of all cores in use, and of the cores that this process uses."""

    wall: float
    cores: float
    own: float


class ThreadWatch:
    """Takes threads away while other processes use their cores, and gives them back afterwards.

    Leaving the context restores the number.

    Args:
        device: device of the run; nothing is done unless it is a CPU.
        log: receives a message whenever the number of threads changes.
        interval: smallest number of seconds between two readings.
        compiled: whether the model is compiled.
    """

    def __init__(
        self, device: torch.device, log: Callable[[str], None], interval: float = INTERVAL, compiled: bool = False
    ) -> None:
        self.most, self.log, self.interval, self.compiled = torch.get_num_threads(), log, interval, compiled
        halves = (self.most // part or 1 for part in (4, 2, 1))
        self.numbers = tuple(halves if compiled else range(1, self.most + 1))
        self.used = {self.most}
        enabled = device.type == "cpu" and self.most > 1 and "OMP_NUM_THREADS" not in os.environ
        self.last = read() if enabled else None
        readings = math.ceil(SECONDS_TO_COMPILE / interval)
        self.others = deque([0.0] * readings, readings)  # cores that other processes used, by interval

    def __enter__(self) -> "ThreadWatch":
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.most)

    def update(self) -> None:
        """Adapt the number of threads to the time since the last reading, if that is long enough."""
        if self.last is None or time.perf_counter() - self.last.wall < self.interval:
            return
        now = read()
        if now is None:
            return
        wall, cores, own = (after - before for after, before in zip(now, self.last, strict=True))
        self.last = now
        self.others.append(max(0.0, cores - own) / wall)
        wanted = self.agreed(AGREEING)
        if self.compiled and wanted not in self.used:
            wanted = self.agreed(max(AGREEING, int(SECONDS_TO_COMPILE / wall)))
        if wanted != torch.get_num_threads():
            again = ", for which the model is compiled again" if self.compiled and wanted not in self.used else ""
            self.used.add(wanted)
            torch.set_num_threads(wanted)
            self.log(
                f"other processes use {self.others[-1]:.1f} CPU cores: training with {wanted} of {self.most} "
                f"threads{again}"
            )

    def agreed(self, readings: int) -> int:
        """Number of threads that the last readings allow: the current one, changed as far as all of them agree."""
        numbers = [self.threads_for(others) for others in list(self.others)[-readings:]]
        return max(min(numbers), min(max(numbers), torch.get_num_threads()))

    def threads_for(self, others: float) -> int:
        """Number of threads for a machine on which others use this number of cores."""
        free = len(os.sched_getaffinity(0)) - others  # where this does not exist, read() returns None
        return max((number for number in self.numbers if number <= free + MARGIN), default=self.numbers[0])


def read() -> Reading | None:
    """Current reading; None where the system does not tell."""
    try:
        names = {f"cpu{number}" for number in os.sched_getaffinity(0)}  # work on other cores does not matter
        lines = [line.split() for line in STATISTICS.read_text(encoding="ascii").splitlines()]
        cores = [map(int, words[1:9]) for words in lines if words and words[0] in names]
        user, nice, system, _, _, irq, soft_irq, steal = map(sum, zip(*cores, strict=True))
    except (OSError, ValueError, AttributeError):  # not Linux
        return None
    own_is_nice = os.nice(0) > 0
    used = user + system + irq + soft_irq + steal + (nice if own_is_nice else 0)  # others with less priority give way
    return Reading(time.perf_counter(), used / CLOCK, time.process_time())
