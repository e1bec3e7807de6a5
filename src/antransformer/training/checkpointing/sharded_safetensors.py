"""Sharded tensors in safetensors files: each rank writes some shards and reads the shards that it holds.

The format is the one of torch's ``HuggingFaceStorageWriter``. The header of a file of shards gives the offsets of each
shard in its tensor. A file without them has complete tensors. torch.distributed.checkpoint plans which slices are read,
so a model can be loaded under another sharding than it was saved with, and no rank reads more than it holds.
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

SHARDING_KEY = "DCP_SHARDING_INFO"  # header entry, JSON of {name: {"saved_offsets": offset of the shard on each axis}}
OFFSETS_KEY = "saved_offsets"

Box = tuple[tuple[int, int], ...]  # (offset, length) of a shard on each axis of its tensor


class LocalShards:
    """Host copies of the shards that this rank writes.

    A shard held by several ranks is written by one of them, chosen round-robin. Plain tensors, which all ranks hold,
    are written by rank 0.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rank: int = 0) -> None:
        self._copies: dict[str, Tensor] = {}
        self._offsets: dict[str, dict[str, list[int]]] = {}
        self._sharded_count = 0
        for item in create_default_local_save_plan(dict(tensors), is_coordinator=True).items:
            assert item.tensor_data is not None
            name, chunk = item.index.fqn, item.tensor_data.chunk
            value, is_writer = tensors[name], rank == 0
            if isinstance(value, DTensor):
                # A shard is empty where a dimension has fewer rows than ranks.
                is_writer = chunk.sizes.numel() > 0 and _is_writer(value, self._sharded_count)
                value = value.to_local()
                self._sharded_count += 1
            if is_writer:
                self._offsets[name] = {OFFSETS_KEY: list(chunk.offsets)}
                self._copies[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def write(self, path: Path) -> str:
        """Write the copies to a new file, flush it to the disk and return its sha256 as hex digits.

        Raises:
            OSError, SafetensorError: the file cannot be written.
        """
        header = {SHARDING_KEY: json.dumps(self._offsets)} if self._sharded_count else None
        safetensors.torch.save_file(self._copies, path, header)
        # safetensors creates files that only their owner can read: take the folder's permissions, without execution.
        path.chmod(path.parent.stat().st_mode & 0o666)
        flush(path)
        return sha256(path)


def _is_writer(value: DTensor, index: int) -> bool:
    """Return whether this rank writes its shard of the ``index``-th tensor.

    Ranks that differ only along replicated mesh axes hold the same shard. They take turns by tensor, so that all write
    about as many bytes.
    """
    holders, position = 1, 0
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(value.placements):
        if placement.is_replicate():
            size = value.device_mesh.size(axis)
            holders, position = holders * size, position * size + coordinate[axis]
    return index % holders == position


class TensorFiles:
    """Complete or sharded tensors in safetensors files; the constructor reads only the headers.

    Attributes:
        shapes: shape of each complete tensor, by name.

    Raises:
        CheckpointError: a file cannot be read, or the shards of a tensor leave a gap or overlap.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths: dict[MetadataIndex, Path] = {}
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for path in paths:
            with _reading(path) as file:
                sharding = json.loads((file.metadata() or {}).get(SHARDING_KEY, "null"))
                for name in file.keys():  # noqa: SIM118 (it is not a mapping)
                    sizes = torch.Size(file.get_slice(name).get_shape())
                    offsets = torch.Size([0] * len(sizes) if sharding is None else sharding[name][OFFSETS_KEY])
                    chunks.setdefault(name, []).append(ChunkStorageMetadata(offsets, sizes))
                    self._paths[MetadataIndex(name, offsets)] = path
        self.shapes = {}
        for name, shards in chunks.items():
            try:
                boxes = [tuple(zip(shard.offsets, shard.sizes, strict=True)) for shard in shards]
                self.shapes[name] = torch.Size(_full_shape(boxes))
            except ValueError as error:
                raise CheckpointError(f"{path.parent}: the shards of {name} leave a gap or overlap") from error
        self._metadata = Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(), shape, chunks[name])
                for name, shape in self.shapes.items()
            }
        )

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors`` in place; of a DTensor only this rank's shard is read.

        Args:
            tensors: tensors by name, with the shapes in ``shapes``.

        Raises:
            CheckpointError: a file cannot be read.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), self._metadata)
        reads: dict[Path, list[Any]] = {}  # grouped, to open each file once
        for item in planner.create_local_plan().items:
            reads.setdefault(self._paths[item.storage_index], []).append(item)
        for path, items in reads.items():
            with _reading(path) as file:
                for item in items:
                    bounds = zip(item.storage_offsets, item.lengths, strict=True)
                    slices = tuple(slice(offset, offset + length) for offset, length in bounds)
                    planner.resolve_tensor(item).copy_(file.get_slice(item.storage_index.fqn)[slices])


def _full_shape(boxes: list[Box]) -> tuple[int, ...]:
    """Return the shape of the tensor that the boxes fill without gap or overlap.

    Only grids are accepted, since the shards of a weight on a device mesh always form one.

    Raises:
        ValueError: the boxes do not form a grid that starts at the origin.
    """
    if boxes == [()]:
        return ()
    slabs: dict[tuple[int, int], list[Box]] = {}  # boxes by their extent on the last axis
    for *others, last in boxes:
        slabs.setdefault(last, []).append(tuple(others))
    end = 0
    for offset, length in sorted(slabs):
        if offset != end:
            raise ValueError
        end += length
    (shape,) = {_full_shape(slab) for slab in slabs.values()}  # another number of shapes raises ValueError
    return (*shape, end)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a safetensors file; any error inside becomes a ``CheckpointError``."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            yield file
    # Headers from untrusted files, with odd types or huge sizes, raise any of these in safetensors and torch.
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
