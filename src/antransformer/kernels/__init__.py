"""Triton kernels of operations whose plain form reads and writes a tensor more often than it has to.

Each has a twin in torch's operations beside its caller, of the same arguments and results, which a CPU takes and
``torch.compile`` too: the compiler fuses what it sees both passes of, and a kernel of ours would be in its way. Triton
comes with the CUDA builds of torch; a kernel's file imports it, and is imported only where ``wanted`` says so.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Whether a kernel is to work on this tensor."""
    return x.is_cuda and not torch.compiler.is_compiling() and _has_triton()


def row_sizes(width: int) -> dict[str, int]:
    """Options of a kernel that has a row of this width in registers."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
