"""Projection of the rows of matrices (``bounds.project_``) in one launch; only rows that are too long are written."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from antransformer.kernels import device_of

TILE = 4096  # elements that a program reads

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def project_rows_(matrices: Sequence[Tensor], strict: bool) -> None:
    """Project every row into the unit ball, or onto the unit sphere if strict, in place.

    Args:
        matrices: contiguous matrices of equal width, dtype and device.
        strict: whether norms are exactly 1 instead of at most 1.
    """
    first = matrices[0]
    width, kind = first.shape[1], TYPES[first.dtype]
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    addresses = tuple((matrix.data_ptr(), len(matrix)) for matrix in matrices)
    table = _tiles(addresses, rows, width * first.itemsize, first.device)
    if not len(table):
        return
    with device_of(first):
        _project[(len(table),)](
            table,
            width,
            MIN_LENGTH=0.0 if strict else 1.0,
            KIND=kind,
            PRECISION=tl.float64 if kind == tl.float64 else tl.float32,
            ROWS=rows,
            BLOCK=block,
            num_warps=min(16, max(4, block // 512)),
        )


@lru_cache(maxsize=64)  # the addresses of weights do not change from step to step
def _tiles(matrices: tuple[tuple[int, int], ...], rows: int, row_bytes: int, device: torch.device) -> Tensor:
    """Address of the first row and number of rows of each tile (tiles, 2), from address and rows of each matrix."""
    tiles = [
        (address + start * row_bytes, min(rows, count - start))
        for address, count in matrices
        for start in range(0, count, rows)
    ]
    return torch.tensor(tiles, dtype=torch.int64).reshape(-1, 2).to(device)


@triton.jit
def _project(
    tiles,
    width,
    MIN_LENGTH: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tiles + 2 * tl.program_id(0)
    weight = tl.load(tile).to(tl.pointer_type(KIND))
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < tl.load(tile + 1)) & (column < width)
    pointer = weight + row * width + column
    values = tl.load(pointer, mask=inside, other=0.0).to(PRECISION)
    length = tl.sqrt(tl.sum(values * values, 1))[:, None]
    too_long = length > MIN_LENGTH  # a zero row stays zero
    values = values / tl.where(too_long, length, 1.0)
    tl.store(pointer, values.to(KIND), mask=inside & too_long)
