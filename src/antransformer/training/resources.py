"""Memory and CPU cores that a run may use, within the limits of its container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free on a device; infinite if unknown."""
    if device.type == "cuda":
        # torch's allocator keeps released memory of this process for its next tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = math.inf
    groups = _control_groups("memory")
    return min((available, *(_free_in_group(group, _MEMORY_FILES[version]) for group, version in groups)))


def available_cores() -> int:
    """Number of CPU cores that this process may use: its affinity, or less if a container limits the CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = min((float(cores), *(_cpu_limit(*group) for group in _control_groups("cpu"))))
    return max(1, math.ceil(limit))


class _MemoryFiles(NamedTuple):
    """File names of a control group, and the field of ``memory.stat`` with the bytes that are freed on demand."""

    limit: str
    used: str
    cached: str


_MEMORY_FILES = {
    1: _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _MemoryFiles("memory.max", "memory.current", "inactive_file"),
}


def _control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The control groups that limit a resource of this process, from the innermost on, with their version."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, version = (CONTROL_GROUPS / controller, 1) if controllers else (CONTROL_GROUPS, 2)
        folder = base / path.strip("/")
        yield from ((group, version) for group in (folder, *folder.parents) if group.is_relative_to(base))


def _free_in_group(group: Path, files: _MemoryFiles) -> float:
    """Bytes up to the limit of a group; infinite without a limit."""
    try:
        limit, used = (float((group / name).read_text()) for name in (files.limit, files.used))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return math.inf
    return limit - used + float(statistics.get(files.cached, 0))


def _cpu_limit(group: Path, version: int) -> float:
    """Cores' worth of CPU time that a group may use; infinite without a limit."""
    try:
        if version == 2:
            quota, period = map(float, (group / "cpu.max").read_text().split())
        else:
            quota, period = (float((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return math.inf
    return quota / period if quota > 0 else math.inf  # version 1 has a quota of -1 without a limit
