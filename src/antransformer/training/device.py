"""Device and precision of a run."""

import contextlib
import gc
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from antransformer.errors import ConfigError
from antransformer.training.config import TrainConfig
from antransformer.training.resources import available_cores
from antransformer.wording import counted


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Device of this process. ``auto`` prefers CUDA, then Apple's MPS, then the CPU.

    A CUDA device without a number gets the number of the local rank, and becomes the current device. The number of
    torch's CPU threads is limited to ``OMP_THREAD_LIMIT``. Unless ``OMP_NUM_THREADS`` is set, it is also limited to
    the CPU time that a container allows.

    Args:
        name: value of ``--device``.
        local_rank: rank of this process on its node.
        local_size: number of processes on its node.

    Raises:
        ConfigError: the device does not exist, or there are fewer devices than processes.
    """
    _apply_thread_limit()
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if local_size > 1 and name.startswith("cuda:"):
        raise ConfigError(f"device {name!r} cannot be shared by {local_size} processes: use cuda, one device for each")
    if name == "cuda" and 0 < torch.cuda.device_count() < local_size:
        raise ConfigError(
            f"{local_size} processes on this node but only {counted(torch.cuda.device_count(), 'CUDA device')}: "
            "lower torchrun's --nproc-per-node, or use --device cpu"
        )
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()  # fails on the meta device, which has no values
        if device.type == "cpu" and device.index:
            raise ValueError("there is one CPU device")  # torch accepts any number
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if reason.startswith("Expected one of"):  # all device types of torch, of which most builds have two
            raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or mps") from error
        raise ConfigError(f"device {name!r} is not available here ({reason}): use another device or cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton starts kernels on the current device, wherever their tensors are
    return device


def _apply_thread_limit() -> None:
    # With more threads than OMP_THREAD_LIMIT lets start, oneDNN leaves part of its work undone. A bfloat16 product on
    # a CPU, as in each step of Muon, is then silently wrong (torch 2.13).
    text = os.environ.get("OMP_THREAD_LIMIT", "")
    limit = int(text) if text.isdecimal() and int(text) else sys.maxsize
    if "OMP_NUM_THREADS" not in os.environ:
        limit = min(limit, available_cores())
    if limit < torch.get_num_threads():
        torch.set_num_threads(limit)


def resolve_auto(config: TrainConfig, device: str) -> TrainConfig:
    """Settings of a new run with its precision and compilation chosen by the device.

    Precision ``auto`` becomes bfloat16 where the device multiplies it fast. The model is compiled on CUDA devices.

    Args:
        config: settings of the run.
        device: value of ``--device``.
    """
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    on_mps = device == "mps" or (device == "auto" and not on_cuda and torch.backends.mps.is_available())
    precision, compiled = config.precision, config.compile
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16("cuda" if on_cuda else "mps" if on_mps else "cpu") else "float32"
    return replace(config, precision=precision, compile=on_cuda if compiled is None else compiled)


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a device has instructions for products of bfloat16. Without them these are slower than float32.

    Args:
        device_type: ``cuda`` (the current GPU), ``cpu`` or ``mps``. Of Apple's GPUs only the newer ones have them, and
            torch does not tell which.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 and older
        private = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in private)
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Dtype of matrix products. With ``fp8`` it is bfloat16, for everything but the linear layers of the blocks.

    Runs of earlier releases have ``auto``: bfloat16 on a CUDA device and float32 elsewhere.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def precision_note(name: str, device: torch.device) -> str:
    """Note for the user about a precision that is slow on a device; empty where it is fast."""
    if name == "fp8" and device.type == "cpu":
        return "fp8 is simulated on a CPU, with the rounding of a GPU but not its speed"
    if choose_precision(name, device) == torch.bfloat16 and not multiplies_bfloat16(device.type):
        name = "CPU" if device.type == "cpu" else "GPU"
        return f"warning: this {name} has no instructions for bfloat16, so precision float32 is faster"
    return ""


def release_memory(device: torch.device) -> None:
    """Return the memory of deleted tensors to the device, so that other processes can use it; nothing on a CPU."""
    if device.type == "cpu":
        return
    torch.compiler.reset()  # compiled code and CUDA graphs keep tensors
    gc.collect()
    torch.accelerator.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means that a device or the CPU has no memory left."""
    # On a CPU torch raises a plain RuntimeError with this text.
    texts = ("allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Mixed precision: matrix products in ``precision``, parameters and reductions in float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


def cpu_name() -> str:
    """Model name of the CPU from ``/proc/cpuinfo``, or what ``platform`` knows on other systems."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
