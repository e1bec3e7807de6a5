"""Parts of tensors in files: what is written under one way to share a model is read under any other."""

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
from antransformer.training.checkpointing import sharded_safetensors as tensor_files
from antransformer.training.checkpointing.sharded_safetensors import LocalShards, TensorFiles
from antransformer.training.distributed.parallel import DistributedContext, make_mesh, shard, shard_like
from antransformer.training.distributed.tensor_parallel import split
from helpers.small import SMALL

# Processes, how many are on a machine, how many split a layer, and the way to share.
LAYOUTS = {
    "alone": (1, 1, 1, "fsdp"),
    "replicate": (2, 2, 1, "ddp"),
    "shard": (3, 3, 1, "fsdp"),
    "hybrid": (4, 2, 1, "hsdp"),
    "tensor-shard": (4, 4, 2, "fsdp"),
    "tensor-hybrid": (8, 4, 2, "hsdp"),
}
CONFIG = ModelConfig(**{**SMALL, "layers": 1}, vocab_size=257)  # which no number of processes divides


def in_each(layout, work):
    """Call ``work`` with rank and weights in each process of a layout, which is a fork: torch remembers its mesh."""
    for rank in range(LAYOUTS[layout][0]):
        child = multiprocessing.get_context("fork").Process(target=enter, args=(layout, rank, work))
        child.start()
        child.join(60)
        assert child.exitcode == 0, f"rank {rank} failed"


def enter(layout, rank, work):
    """Be one of so many processes, of which there are no others."""
    size, local, tensor, way = LAYOUTS[layout]
    with torch.device("meta"):
        model = build(CONFIG)
    if size > 1:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        mesh = make_mesh(way, DistributedContext(rank, size, rank % local, local, tensor), torch.device("cpu"))
        if tensor > 1:
            split(model, mesh["tensor"])
        shard(model, mesh["replicate", "shard"], torch.float32)
    work(rank, model.to_empty(device="cpu").state_dict())


@pytest.fixture(scope="module")
def truth():
    torch.manual_seed(0)
    model = build(CONFIG)
    weights = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    return {**weights, "count": torch.tensor(7.0)}  # as Adam's, a plain tensor in each process


@pytest.fixture(scope="module")
def written(truth, tmp_path_factory):
    """The files of a layout, by its name."""
    found = {}

    def write(layout):
        if layout not in found:
            folder = tmp_path_factory.mktemp(layout)

            def work(rank, weights):
                tensors = {name: shard_like(value, weights.get(name, value)) for name, value in truth.items()}
                LocalShards(tensors, rank).write(folder / f"{rank}.safetensors")

            in_each(layout, work)
            found[layout] = sorted(folder.iterdir())
        return found[layout]

    return write


@pytest.mark.parametrize(("old", "new"), [*pairwise([*LAYOUTS, "alone", "tensor-shard"])])
def test_what_is_written_by_some_is_read_by_others(written, truth, monkeypatch, old, new):
    files = TensorFiles(written(old))
    assert files.shapes == {name: value.shape for name, value in truth.items()}
    size, _, tensor, way = LAYOUTS[new]
    held = size if way == "fsdp" else 2 * tensor if way == "hsdp" else tensor

    def work(_rank, weights):
        empty = {**{name: torch.zeros_like(value) for name, value in weights.items()}, "count": torch.zeros(())}
        read = count_reads(monkeypatch)
        files.read_into(empty)
        for name, value in empty.items():
            assert torch.equal(local(value), local(shard_like(truth[name], value))), name
        # No more than it holds, of which it may be the rows that are left over.
        assert sum(read) == sum(local(value).numel() for value in empty.values())
        assert sum(read) < 1.3 * sum(value.numel() for value in truth.values()) / held

    in_each(new, work)


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def count_reads(monkeypatch):
    """A list that gets the number of elements of whatever is read from a file."""
    read = []

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, box):
            value = self.inner[box]
            read.append(value.numel())
            return value

    @contextmanager
    def opened(path, framework):
        with safe_open(path, framework=framework) as file:
            yield SimpleNamespace(get_slice=lambda name: Slice(file.get_slice(name)))

    monkeypatch.setattr(tensor_files, "safe_open", opened)
    return read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_written_once_and_all_have_about_as_much_to_write(written, truth, layout):
    shapes, headers = [], []
    for path in written(layout):
        with safe_open(path, framework="pt") as file:
            headers.append(file.metadata())
        shapes.append([value.numel() for value in load_file(path).values()])
    assert sum(map(sum, shapes)) == sum(value.numel() for value in truth.values())
    assert max(map(sum, shapes)) < 2 * sum(map(sum, shapes)) / len(shapes)
    assert [header is None for header in headers] == [layout == "alone"] * len(headers)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_them_too(written, truth):
    folder = written("tensor-shard")[0].parent
    tensors = {name: torch.zeros_like(value) for name, value in truth.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, value in truth.items():
        assert torch.equal(tensors[name], value), name


BLOCK = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    "parts",
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
def test_parts_that_make_no_whole_are_refused(tmp_path, parts):
    paths = []
    for number, (begin, part) in enumerate(parts):
        header = {"DCP_SHARDING_INFO": json.dumps({"weight": {"saved_offsets": begin}})}
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"weight": part.contiguous()}, paths[-1], header)
    with pytest.raises(CheckpointError) as error:
        TensorFiles(paths)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert re.search(r"\bweight\b|\d\.safetensors", str(error.value))


@pytest.mark.parametrize("header", ["[", "7", "[1]", "{}", '{"weight": 1}', '{"weight": {}}', "[" * 100_000])
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    save_file({"weight": BLOCK}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": header})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        TensorFiles([tmp_path / "a.safetensors"])
