"""Where a run computes, and in which precision."""

import contextlib
import os

import torch

from antransformer.errors import ConfigError


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """``auto`` takes a CUDA device, then Apple's, then the CPU; of CUDA devices without a number that of the rank.

    From here on torch counts on no more threads than ``OMP_THREAD_LIMIT`` allows.

    Args:
        name: as in ``--device``.
        local_rank: number of this process on its machine, from 0.
        local_size: how many are on this machine.

    Raises:
        ConfigError: no such device here, or not one for each process.
    """
    _keep_thread_limit()
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if local_size > 1 and name.startswith("cuda:"):
        raise ConfigError(f"device {name!r} can not be that of {local_size} processes: use cuda, and each takes one")
    if name == "cuda" and 0 < torch.cuda.device_count() < local_size:
        raise ConfigError(
            f"{local_size} processes on this machine and {torch.cuda.device_count()} CUDA devices: start no more "
            "with torchrun --nproc-per-node, or use --device cpu"
        )
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"device {name!r} is not available here: use auto or cpu") from error
    return device


def _keep_thread_limit() -> None:
    """Count on no more threads than OMP_THREAD_LIMIT lets start: oneDNN leaves the part of the others undone.

    A product in bfloat16 on a CPU, as each step of Muon makes, is else wrong without a word (torch 2.13).
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a CUDA device and float32 elsewhere; with ``fp8`` it is what all else has, bfloat16."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory left; on a CPU torch says so by words only."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Mixed precision: matrix products in ``precision``, parameters and reductions in float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
