"""Memory that is free for a run: of a GPU, or of a machine within the limits of its container."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free on a device; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = math.inf
    groups = _control_groups(CONTROL_GROUPS, Path("/proc/self/cgroup"))
    return min((available, *(_free_in_group(*group) for group in groups)))


class _Files(NamedTuple):
    """File names of a control group, and the field of ``memory.stat`` with the bytes that are freed on demand."""

    limit: str
    used: str
    cached: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def _control_groups(root: Path, membership: Path) -> Iterator[tuple[Path, _Files]]:
    """The control groups that limit the memory of this process, from the innermost to ``root``."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, files = (root / "memory", _VERSION_1) if controllers else (root, _VERSION_2)
        folder = base / path.strip("/")
        yield from ((group, files) for group in (folder, *folder.parents) if group.is_relative_to(base))


def _free_in_group(group: Path, files: _Files) -> float:
    """Bytes up to the limit of a group; infinite without a limit."""
    try:
        limit, used = (float((group / name).read_text()) for name in (files.limit, files.used))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return math.inf
    return limit - used + float(statistics.get(files.cached, 0))
