"""The number of threads where other processes use the cores."""

import os
import subprocess
import sys

import pytest
import torch

from antransformer.training import threads
from antransformer.training.threads import Reading, ThreadWatch
from helpers.messages import mentions

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine of 8 cores on which this process has 8 threads; returns how many of its cores others use."""
    others, readings = [0.0], []

    def read():
        last = readings[-1] if readings else Reading(0.0, 0.0, 0.0)
        own = torch.get_num_threads() * threads.INTERVAL
        readings.append(
            Reading(last.wall + threads.INTERVAL, last.cores + own + others[0] * threads.INTERVAL, last.own + own)
        )
        return readings[-1]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(threads, "read", read)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: readings[-1].wall + threads.INTERVAL)
    before, count = torch.get_num_threads(), [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: count.__setitem__(0, number))
    yield others
    monkeypatch.undo()
    assert torch.get_num_threads() == before


def test_threads_give_way_to_other_processes_and_return(machine):
    notes, counts = [], []
    with ThreadWatch(CPU, notes.append) as watch:
        for others in (0, 0, 1, 1, 1, 6, 6, 9, 9, 0.2, 0.2):
            machine[0] = others
            watch.update()
            counts.append(torch.get_num_threads())
    assert counts == [8, 8, 8, 7, 7, 7, 2, 2, 1, 1, 8]
    assert len(notes) == 4 and mentions(notes[0], "1.0", 7, 8)
    assert torch.get_num_threads() == 8


def test_a_moment_of_other_work_changes_nothing(machine):
    notes = []
    with ThreadWatch(CPU, notes.append) as watch:
        for others in (0, 4, 0, 4, 0):
            machine[0] = others
            watch.update()
    assert not notes


def test_a_number_that_the_user_chose_is_kept(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    machine[0] = 5.0
    with ThreadWatch(CPU, pytest.fail) as watch:
        for _ in range(4):
            watch.update()
    assert torch.get_num_threads() == 8


def test_a_compiled_model_changes_late_and_to_few_numbers(machine):
    """It is compiled for every number, so the first change waits. A number that was used before is free."""
    notes, counts = [], []
    with ThreadWatch(CPU, notes.append, compiled=True) as watch:
        for others, readings in ((5, 29), (5, 1), (0, 2), (5, 2), (3, 29), (3, 1), (8, 2)):
            machine[0] = others
            for _ in range(readings):
                watch.update()
            counts.append(torch.get_num_threads())
    assert counts == [8, 2, 8, 2, 2, 4, 2]
    assert [mentions(note, "compiled") for note in notes] == [True, False, False, True, False]


def test_only_cores_that_this_process_may_use_count(monkeypatch, tmp_path):
    lines = ("cpu 999 0 0 0 0 0 0 0 0 0", "cpu0 100 0 20 7 7 3 4 5 0 0", "cpu1 800 0 0 0 0 0 0 0 0 0", "intr 5", "")
    (tmp_path / "stat").write_text("\n".join(lines))
    monkeypatch.setattr(threads, "STATISTICS", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0}, raising=False)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    assert threads.read().cores == 132 / threads.CLOCK


def test_reading_counts_the_seconds_of_this_process_and_of_others():
    first = threads.read()
    if first is None:
        pytest.skip("no /proc/stat")
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    second = threads.read()
    wall, cores, own = (after - before for after, before in zip(second, first, strict=True))
    assert cores - own > 0.1 and own < wall


class Library:
    """C library that records the calls of mallopt."""

    def __init__(self):
        self.calls = []

    def mallopt(self, *arguments):
        self.calls.append(arguments)


@pytest.mark.parametrize(
    ("device", "platform", "variable", "count"),
    [
        ("cpu", "linux", None, 2),
        ("cpu", "linux", "MALLOC_TRIM_THRESHOLD_", 0),
        ("cpu", "darwin", None, 0),
        ("cuda", "linux", None, 0),
    ],
)
def test_memory_of_freed_tensors_is_kept_on_a_cpu_unless_the_user_chose(device, platform, variable, count, monkeypatch):
    library = Library()
    for name in threads.MALLOC_OPTIONS:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(threads.sys, "platform", platform)
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda _: library)
    threads.keep_freed_memory(torch.device(device))
    assert len(library.calls) == count


def test_a_c_library_without_the_function_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda _: object())
    threads.keep_freed_memory(torch.device("cpu"))
