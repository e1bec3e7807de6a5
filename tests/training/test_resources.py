"""Memory and CPU cores of this machine, of a GPU that torch has used before, and of a container."""

import os
from types import SimpleNamespace

import pytest
import torch

from antransformer.training import device, resources

CPU = torch.device("cpu")


@pytest.fixture
def container(monkeypatch, tmp_path):
    """Function that makes this process a member of control groups, and returns their folder."""

    def join(membership):
        (tmp_path / "membership").write_text(membership)
        return tmp_path

    monkeypatch.setattr(resources, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(resources, "MEMBERSHIP", tmp_path / "membership")
    return join


@pytest.mark.parametrize(
    ("membership", "folder", "names"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu,cpuacct:/\n4:memory:/job",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        (
            "4:memory:/outside/of/the/container",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_memory_limit_of_a_container_counts(membership, folder, names, container):
    group = container(membership) / folder
    group.mkdir(parents=True, exist_ok=True)
    limit, used, cached = names
    (group / limit).write_text("1000000\n")
    (group / used).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 5\n{cached} 100000\n")
    assert resources.free_memory(CPU) == 400000
    (group / limit).write_text("max\n")
    assert resources.free_memory(CPU) > 2**28


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000"}, 2),
        ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
        ("0::/", {"cpu.max": "5000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/", {}, 8),
        ("3:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_the_cpu_limit_of_a_container_counts(membership, files, cores, container, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    root = container(membership)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert resources.available_cores() == cores


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 2),
        ({"OMP_NUM_THREADS": "8"}, 8),
        ({"OMP_THREAD_LIMIT": "4"}, 2),
        ({"OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "4"}, 4),
    ],
)
def test_torch_has_no_more_threads_than_the_container_has_cores(variables, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    count = [8]
    monkeypatch.setattr(device, "available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: count.__setitem__(0, number))
    device.choose_device("cpu")
    assert count == [threads]


def test_memory_that_the_allocator_keeps_is_free_for_the_next_run(monkeypatch):
    fake = SimpleNamespace(
        mem_get_info=lambda _: (1000, 10000), memory_reserved=lambda _: 6000, memory_allocated=lambda _: 2000
    )
    monkeypatch.setattr(torch, "cuda", fake)
    assert resources.free_memory(torch.device("cuda:0")) == 5000


def test_resources_of_this_machine():
    assert 2**28 < resources.free_memory(CPU) <= float("inf")
    assert 1 <= resources.available_cores() <= (os.cpu_count() or 1)
