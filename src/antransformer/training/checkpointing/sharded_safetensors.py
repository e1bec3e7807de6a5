"""Tensors on disk: safetensors files, into which each of many processes writes a part, and of which it reads a part.

The files are those of torch's ``HuggingFaceStorageWriter``: one of parts says in its header where each begins in its
tensor, and one that says nothing holds whole tensors. torch.distributed.checkpoint plans what is read from where, so
that a model may be shared in another way than when it was written, and no process needs more of it than it holds.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from antransformer.errors import CheckpointError
from antransformer.files import flush, require_file

PARTS_KEY = "DCP_SHARDING_INFO"  # in the header, as {name: {"saved_offsets": where its part begins on each axis}}
OFFSETS_KEY = "saved_offsets"


class LocalShards:
    """Copies in main memory of what one process has to write of tensors that may be shared.

    Of the processes that hold the same part one has to, another one from tensor to tensor; what all of them hold as
    plain tensors the first has to.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rank: int = 0) -> None:
        self._copies: dict[str, Tensor] = {}
        self._begins: dict[str, dict[str, list[int]]] = {}
        self._shared = 0  # how many of the tensors are
        for item in create_default_local_save_plan(dict(tensors), is_coordinator=True).items:
            assert item.tensor_data is not None
            name, part = item.index.fqn, item.tensor_data.chunk
            value, mine = tensors[name], rank == 0
            if isinstance(value, DTensor):
                mine = part.sizes.numel() > 0 and _in_turn(value, self._shared)
                value = value.to_local()
                self._shared += 1
            if mine:
                self._begins[name] = {OFFSETS_KEY: list(part.offsets)}
                self._copies[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def write(self, path: Path) -> str:
        """Write them into a new file, and see it onto the disk; returns its sha256.

        Raises:
            OSError, SafetensorError: it can not be written.
        """
        header = {PARTS_KEY: json.dumps(self._begins)} if self._shared else None
        safetensors.torch.save_file(self._copies, path, header)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        flush(path)
        return sha256(path)


def _in_turn(value: DTensor, number: int) -> bool:
    """Whether, of all that hold the same part of the tensor of this number, this process is the one to write it."""
    holders, mine = 1, 0
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(value.placements):
        if placement.is_replicate():
            size = value.device_mesh.size(axis)
            holders, mine = holders * size, mine * size + coordinate[axis]
    return number % holders == mine


class TensorFiles:
    """The tensors that lie in files, whole or in parts, as far as the files' headers tell.

    Attributes:
        shapes: of the whole tensors, by name.

    Raises:
        CheckpointError: a file can not be read, or the parts of a tensor do not make a whole.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[MetadataIndex, Path] = {}
        parts: dict[str, list[ChunkStorageMetadata]] = {}
        for path in paths:
            with _reading(path) as file:
                begins = json.loads((file.metadata() or {}).get(PARTS_KEY, "null"))
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    sizes = torch.Size(file.get_slice(name).get_shape())
                    offsets = torch.Size([0] * len(sizes) if begins is None else begins[name][OFFSETS_KEY])
                    parts.setdefault(name, []).append(ChunkStorageMetadata(offsets, sizes))
                    self._places[MetadataIndex(name, offsets)] = path
        self.shapes = {}
        for name, chunks in parts.items():
            try:
                boxes = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks]
                self.shapes[name] = torch.Size(_shape(boxes))
            except ValueError as error:
                raise CheckpointError(f"{path.parent}: the parts of {name} do not make a whole") from error
        self._metadata = Metadata(
            {name: TensorStorageMetadata(TensorProperties(), shape, parts[name]) for name, shape in self.shapes.items()}
        )

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors of these names and shapes; of one that is shared, the part that this process holds.

        Raises:
            CheckpointError: a file can not be read.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), self._metadata)
        reads: dict[Path, list[Any]] = {}
        for item in planner.create_local_plan().items:
            reads.setdefault(self._places[item.storage_index], []).append(item)
        for path, items in reads.items():
            with _reading(path) as file:
                for item in items:
                    begins_and_lengths = zip(item.storage_offsets, item.lengths, strict=True)
                    box = tuple(slice(begin, begin + length) for begin, length in begins_and_lengths)
                    planner.resolve_tensor(item).copy_(file.get_slice(item.storage_index.fqn)[box])


Box = tuple[tuple[int, int], ...]  # where a part of a tensor begins, and how long it is, on each axis


def _shape(boxes: list[Box]) -> tuple[int, ...]:
    """The shape of the tensor that the boxes fill without gap or overlap.

    Raises:
        ValueError: there is none. (The parts of a weight on a mesh make a grid, and no other pattern is looked for.)
    """
    if boxes == [()]:
        return ()
    slabs: dict[tuple[int, int], list[Box]] = {}  # along the last axis
    for *others, last in boxes:
        slabs.setdefault(last, []).append(tuple(others))
    end = 0
    for begin, length in sorted(slabs):
        if begin != end:
            raise ValueError
        end += length
    (shape,) = {_shape(inner) for inner in slabs.values()}
    return (*shape, end)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A safetensors file, open; whatever is wrong with it is a ``CheckpointError``."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            yield file
    # Odd types and sizes raise anything.
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: can not be read: {' '.join(str(error).split())}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
