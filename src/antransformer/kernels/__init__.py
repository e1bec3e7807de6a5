"""Kernels for operations that plain torch runs in more passes over memory, or more slowly, than necessary.

``chunked_cross_entropy``, ``cpu_attention``, ``document_attention`` and ``rotary`` are plain torch, all others Triton
kernels. The caller of each of these also has the same operation in plain torch, which runs on CPUs. Most are plain
torch under ``torch.compile`` too, since the compiler fuses an operation with its neighbours. A kernel that is faster
than that is part of a custom operator. Triton comes with the CUDA builds of torch. The Triton files import it, so
they are imported only on a GPU.
"""

import contextlib
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# torch 2.11 compiles is_exporting() as a constant, True.
KNOWS_EXPORT = torch.__version__ >= "2.12"


def use_triton(x: Tensor) -> bool:
    """Whether to run a Triton kernel on this tensor: it is on a GPU, not being compiled, and Triton is installed."""
    return x.is_cuda and not torch.compiler.is_compiling() and has_triton()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast casts this operand of a matrix product; there is no autocast on the meta device."""
    device = x.device.type
    return x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """While entered, the device of the tensor is the current one, on which Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def is_compiled_for_gpu(x: Tensor) -> bool:
    """Whether ``torch.compile`` traces for a GPU; an exported program must not have operators of this package."""
    return x.is_cuda and torch.compiler.is_dynamo_compiling() and not (KNOWS_EXPORT and torch.compiler.is_exporting())


def row_sizes(width: int) -> dict[str, int]:
    """Launch options of a kernel that keeps a row of this width in registers: block size and warps."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
