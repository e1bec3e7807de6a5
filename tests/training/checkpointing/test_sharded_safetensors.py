"""Sharded tensors in files: tensors written under one layout can be read under any other."""

import json
import multiprocessing
import re
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from antransformer.errors import CheckpointError
from antransformer.models import ModelConfig, build
from antransformer.training.checkpointing import sharded_safetensors
from antransformer.training.checkpointing.sharded_safetensors import LocalShards, TensorFiles
from antransformer.training.distributed.parallel import DistributedContext, apply_fsdp, make_mesh, shard_like
from antransformer.training.distributed.tensor_parallel import apply_tensor_parallel
from helpers.small import SMALL

# Ranks, ranks per node, tensor-parallel ranks, and strategy.
LAYOUTS = {
    "single": (1, 1, 1, "fsdp"),
    "ddp": (2, 2, 1, "ddp"),
    "fsdp": (3, 3, 1, "fsdp"),
    "hsdp": (4, 2, 1, "hsdp"),
    "tensor-fsdp": (4, 4, 2, "fsdp"),
    "tensor-hsdp": (8, 4, 2, "hsdp"),
}
CONFIG = ModelConfig(
    **{**SMALL, "layers": 1}, vocab_size=257
)  # 257 rows cannot be divided evenly by any number of ranks


def on_each_rank(layout, action):
    """Call ``action`` with rank and weights on each rank of a layout, in forks: torch keeps its mesh per process."""
    for rank in range(LAYOUTS[layout][0]):
        child = multiprocessing.get_context("fork").Process(target=run_as_rank, args=(layout, rank, action))
        child.start()
        child.join(60)
        assert child.exitcode == 0, f"rank {rank} failed"


def run_as_rank(layout, rank, action):
    """Call ``action`` as one rank of a simulated process group; no other rank exists."""
    world_size, local_world_size, tensor_parallel, strategy = LAYOUTS[layout]
    with torch.device("meta"):
        model = build(CONFIG)
    if world_size > 1:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        dist_ctx = DistributedContext(rank, world_size, rank % local_world_size, local_world_size, tensor_parallel)
        mesh = make_mesh(strategy, dist_ctx, torch.device("cpu"))
        if tensor_parallel > 1:
            apply_tensor_parallel(model, mesh["tensor"])
        apply_fsdp(model, mesh["replicate", "shard"], torch.float32)
    action(rank, model.to_empty(device="cpu").state_dict())


@pytest.fixture(scope="module")
def full_tensors():
    torch.manual_seed(0)
    model = build(CONFIG)
    weights = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    return {**weights, "count": torch.tensor(7.0)}  # like Adam's step count, a plain tensor on each rank


@pytest.fixture(scope="module")
def files_of(full_tensors, tmp_path_factory):
    """Return a function that writes the files of a layout, once, and returns their paths."""
    paths = {}

    def write(layout):
        if layout not in paths:
            folder = tmp_path_factory.mktemp(layout)

            def write_shards(rank, weights):
                tensors = {name: shard_like(value, weights.get(name, value)) for name, value in full_tensors.items()}
                LocalShards(tensors, rank).write(folder / f"{rank}.safetensors")

            on_each_rank(layout, write_shards)
            paths[layout] = sorted(folder.iterdir())
        return paths[layout]

    return write


@pytest.mark.parametrize(("old", "new"), [*pairwise([*LAYOUTS, "single", "tensor-fsdp"])])
def test_every_layout_reads_the_files_of_another(files_of, full_tensors, monkeypatch, old, new):
    files = TensorFiles(files_of(old))
    assert files.shapes == {name: value.shape for name, value in full_tensors.items()}
    world_size, _, tensor_parallel, strategy = LAYOUTS[new]
    shards = {"ddp": tensor_parallel, "fsdp": world_size, "hsdp": 2 * tensor_parallel}[strategy]

    def read_shards(_rank, weights):
        empty = {**{name: torch.zeros_like(value) for name, value in weights.items()}, "count": torch.zeros(())}
        read_counts = count_reads(monkeypatch)
        files.read_into(empty)
        for name, value in empty.items():
            assert torch.equal(local(value), local(shard_like(full_tensors[name], value))), name
        # No more than this rank holds. Its shard may be larger than the average, since rows are not divided evenly.
        assert sum(read_counts) == sum(local(value).numel() for value in empty.values())
        assert sum(read_counts) < 1.3 * sum(value.numel() for value in full_tensors.values()) / shards

    on_each_rank(new, read_shards)


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def count_reads(monkeypatch):
    """Return a list that receives the number of elements of every read from a file."""
    counts = []

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, box):
            value = self.inner[box]
            counts.append(value.numel())
            return value

    @contextmanager
    def counting_open(path, framework):
        with safe_open(path, framework=framework) as file:
            yield SimpleNamespace(get_slice=lambda name: Slice(file.get_slice(name)))

    monkeypatch.setattr(sharded_safetensors, "safe_open", counting_open)
    return counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shard_is_written_once_and_ranks_write_about_equal_amounts(files_of, full_tensors, layout):
    sizes, headers = [], []
    for path in files_of(layout):
        with safe_open(path, framework="pt") as file:
            headers.append(file.metadata())
        sizes.append([value.numel() for value in load_file(path).values()])
    assert sum(map(sum, sizes)) == sum(value.numel() for value in full_tensors.values())
    assert max(map(sum, sizes)) < 2 * sum(map(sum, sizes)) / len(sizes)
    assert [header is None for header in headers] == [layout == "single"] * len(headers)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_same_files(files_of, full_tensors):
    folder = files_of("tensor-fsdp")[0].parent
    tensors = {name: torch.zeros_like(value) for name, value in full_tensors.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, value in full_tensors.items():
        assert torch.equal(tensors[name], value), name


BLOCK = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    "shards",
    [
        [((0, 0), BLOCK), ((0, 0), BLOCK)],
        [((0, 0), BLOCK[:1]), ((2, 0), BLOCK[2:])],
        [((0, 0), BLOCK[:2]), ((1, 0), BLOCK[1:])],
        [((0, 0), BLOCK[:, :2]), ((0, 1), BLOCK[:, 2:])],
        [((0, 0), BLOCK[:, :2]), ((0, 2), BLOCK[:2, 2:])],
        [((-1, 0), BLOCK)],
        [((0,), BLOCK)],
        [((0, 0, 0), BLOCK)],
        [(("0", 0), BLOCK)],
        [((2**70, 0), BLOCK)],
    ],
)
def test_shards_with_gaps_or_overlaps_are_refused(tmp_path, shards):
    paths = []
    for number, (offsets, shard) in enumerate(shards):
        header = {"DCP_SHARDING_INFO": json.dumps({"weight": {"saved_offsets": offsets}})}
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"weight": shard.contiguous()}, paths[-1], header)
    with pytest.raises(CheckpointError) as error:
        TensorFiles(paths)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert re.search(r"\bweight\b|\d\.safetensors", str(error.value))


@pytest.mark.parametrize("header", ["[", "7", "[1]", "{}", '{"weight": 1}', '{"weight": {}}', "[" * 100_000])
def test_an_invalid_header_is_refused(tmp_path, header):
    save_file({"weight": BLOCK}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": header})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        TensorFiles([tmp_path / "a.safetensors"])
