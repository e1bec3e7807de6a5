"""Tensor parallelism: the heads, the hidden coordinates and the vocabulary of a model split over the ranks of a mesh.

The layout is that of arXiv:1909.08053: each rank has the rows of its heads and hidden coordinates in the projections
that leave the residual stream, their columns in those that come back, and its tokens' rows of embedding and head. The
residual stream is whole on every rank. The weights are DTensors, so that bounds, optimizer and checkpoints know what
they are; a forward pass computes on this rank's parts, as plain tensors, and communicates where a sublayer ends, and in
the backward pass where it begins.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor

from antransformer.models import Decoder
from antransformer.models.registry import get


def split(model: Decoder, mesh: DeviceMesh) -> None:
    """Split a model that lies on the meta device over a mesh of one dimension.

    Its ``loss`` takes and returns what it did before; its logits are those of this rank's part of the vocabulary.
    """
    # It warns of gathering a weight from the ranks of two axes in two messages, which only a checkpoint does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    distribute_module(model, mesh, partial(_split_weights, get(model.config.architecture).tensor_parallel))
    # Of classes, as FSDP has them, and not of functions around each module: so all blocks are compiled as one.
    for block in model.blocks:
        _become(block, SplitBlock, mesh)
        _become(block.get_submodule("attention"), SplitSublayer, mesh)
        _become(block.get_submodule("mlp"), SplitSublayer, mesh)
    _become(model.embedding, SplitEmbedding, mesh)
    _become(model, SplitDecoder, mesh)


def _split_weights(axes: Mapping[str, int], name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    axis = axes.get(name.rpartition(".")[2])
    if axis is not None:
        for key, weight in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(weight, mesh, [Shard(axis)])))


def _become(module: nn.Module, way: type, mesh: DeviceMesh) -> None:
    module.__class__ = _split_class(way, type(module), mesh)  # type: ignore[arg-type]  # a class can be hashed


@cache
def _split_class(way: type, kind: type, mesh: DeviceMesh) -> type:
    """The class ``kind``, split in a way."""
    return type(f"{way.__name__}{kind.__name__}", (way, kind), {"mesh": mesh})


class SplitSublayer(nn.Module):
    """Attention or an MLP, of which this rank has some heads or hidden coordinates."""

    mesh: DeviceMesh

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The whole output (B, T, d) on every rank, from the whole input."""
        with _parts(self, Partial()):
            return _leave(self.mesh, super().forward(_enter(self.mesh, x), *args))


class SplitBlock(nn.Module):
    """A block, whose norms and residual updates every rank computes."""

    def forward(self, *args: Any) -> Tensor:
        """As the block's own."""
        with _parts(self, Replicate(), without=("attention", "mlp")):
            return super().forward(*args)


class SplitEmbedding(nn.Embedding):
    """An embedding, of which this rank has some rows."""

    mesh: DeviceMesh

    def forward(self, tokens: Tensor) -> Tensor:
        """The whole vectors (B, T, d) of ids (B, T) on every rank."""
        row, mine = _rows(self.mesh, self.num_embeddings, tokens)
        with _parts(self, Partial()):
            return _leave(self.mesh, super().forward(row) * mine.unsqueeze(-1))


class SplitDecoder(Decoder):
    """A model, of whose vocabulary this rank has a part."""

    mesh: DeviceMesh

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, d) to the logits of this rank's part, (B, T, V / N)."""
        with _parts(self, Partial(), without=("embedding", "blocks")):
            return super().logits(_enter(self.mesh, hidden))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """As ``Decoder.loss``, with logits that no rank has whole."""
        logits = self(tokens).float()
        largest = logits.detach().amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.mesh.get_group())
        row, mine = _rows(self.mesh, self.config.vocab_size, targets)
        target = logits.gather(-1, row.unsqueeze(-1)).squeeze(-1) * mine
        sums = _leave(self.mesh, torch.stack([(logits - largest.unsqueeze(-1)).exp().sum(-1), target]))
        return (sums[0].log() + largest - sums[1]).mean()


@contextlib.contextmanager
def _parts(module: nn.Module, gradients: Placement, without: tuple[str, ...] = ()) -> Iterator[None]:
    """While entered, this rank's part of each weight of ``module`` is in the weight's place, a plain tensor.

    Args:
        module: what has the weights, unsharded DTensors of the mesh.
        gradients: how those of whole weights come out: Partial where each rank uses them for its own heads or
            tokens, Replicate where all compute the same.
        without: names of children that are left as they are.
    """
    children = [child for name, child in module.named_children() if name not in without]
    owners = [module, *(inner for child in children for inner in child.modules())]
    weights = [(vars(owner), *item) for owner in owners for item in owner.named_parameters(recurse=False)]
    for attributes, name, weight in weights:
        assert isinstance(weight, DTensor)
        (placement,) = weight.placements
        # An attribute of the same name hides a parameter, which stays registered.
        attributes[name] = weight.to_local(grad_placements=[gradients if placement.is_replicate() else placement])
    try:
        yield
    finally:
        for attributes, name, _ in weights:
            del attributes[name]


def _enter(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """The same tensor; its gradient is the sum of those of all ranks."""
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def _leave(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """The sum of the tensors of all ranks; each gets its gradient."""
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


def _rows(mesh: DeviceMesh, vocabulary: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of this rank's part of the vocabulary for token ids, 0 for those of others, and which are not."""
    rows, first = Shard.local_shard_size_and_offset(vocabulary, mesh.size(), mesh.get_local_rank())
    row = tokens - first
    mine = (row >= 0) & (row < rows)
    return row * mine, mine
