"""Tensor parallelism: the heads, the hidden coordinates and the vocabulary of a model split over the ranks of a mesh.

The layout is that of arXiv:1909.08053: each rank has the rows of its heads and hidden coordinates in the projections
that leave the residual stream, their columns in those that come back, and its tokens' rows of embedding and head. The
residual stream is whole on every rank. The weights are DTensors, so that bounds, optimizer and checkpoints know what
they are; a forward pass computes on this rank's parts, as plain tensors, and communicates where a sublayer ends, and in
the backward pass where it begins.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor

from antransformer.models import Decoder

# Along which axis the weights of a module are split; those of all others are whole on every rank.
SPLIT = {
    "embedding": 0,
    "qkv_proj": 0,  # its rows are ordered head by head
    "out_proj": 1,
    "up_proj": 0,
    "gate_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
    "logit_scale": 0,
}


def split(model: Decoder, mesh: DeviceMesh) -> None:
    """Split a model that lies on the meta device over a mesh of one dimension.

    Its ``loss`` takes and returns what it did before; its logits are those of this rank's part of the vocabulary.
    """
    # It warns of gathering a weight from the ranks of two axes in two messages, which only a checkpoint does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    distribute_module(model, mesh, _split_weights)
    for block in model.blocks:
        sublayers = [block.get_submodule("attention"), block.get_submodule("mlp")]
        for sublayer in sublayers:
            around = partial(_on_parts, list(sublayer.modules()), Partial())
            _wrap(sublayer, "forward", partial(_sublayer, mesh), around)
        _wrap(block, "forward", partial(_on_parts, _others(block, sublayers), Replicate()))
    embedding = model.embedding
    embed = partial(_embed, mesh, embedding.num_embeddings)
    _wrap(embedding, "forward", embed, partial(_on_parts, [embedding], Partial()))
    head = _others(model, [*model.blocks, embedding])
    _wrap(model, "logits", partial(_logits, mesh), partial(_on_parts, head, Partial()))
    model.loss = partial(_loss, mesh, model)  # type: ignore[method-assign]


def _wrap(module: nn.Module, method: str, *wrappers: Callable[..., Tensor]) -> None:
    """Put ``wrappers`` around a method, the innermost first; each gets what is inside as its first argument."""
    for wrapper in wrappers:
        setattr(module, method, partial(wrapper, getattr(module, method)))


def _split_weights(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    axis = SPLIT.get(name.rpartition(".")[2])
    if axis is not None:
        for key, weight in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(weight, mesh, [Shard(axis)])))


def _others(module: nn.Module, without: Iterable[nn.Module]) -> list[nn.Module]:
    """What is inside a module, itself included, but not inside one of those ``without``."""
    left_out = {inner for child in without for inner in child.modules()}
    return [inner for inner in module.modules() if inner not in left_out]


def _on_parts(modules: list[nn.Module], gradients: Placement, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """``forward`` with this rank's part of each weight of ``modules`` in its place.

    Args:
        modules: whose weights are unsharded DTensors of the mesh.
        gradients: how those of whole weights come out: Partial where each rank uses them for its own heads or
            tokens, Replicate where all compute the same.
        forward: what computes.
        args: its arguments.
    """
    weights = [(vars(module), *item) for module in modules for item in module.named_parameters(recurse=False)]
    for attributes, name, weight in weights:
        assert isinstance(weight, DTensor)
        (placement,) = weight.placements
        # An attribute of the same name hides a parameter, which stays registered.
        attributes[name] = weight.to_local(grad_placements=[gradients if placement.is_replicate() else placement])
    try:
        return forward(*args)
    finally:
        for attributes, name, _ in weights:
            del attributes[name]


def _enter(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """The same tensor; its gradient is the sum of those of all ranks."""
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def _leave(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """The sum of the tensors of all ranks; each gets its gradient."""
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


def _sublayer(mesh: DeviceMesh, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """A sublayer's output, from what this rank's heads or hidden coordinates add to it."""
    return _leave(mesh, forward(_enter(mesh, x), *args))


def _logits(mesh: DeviceMesh, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return forward(_enter(mesh, hidden))


def _embed(mesh: DeviceMesh, vocabulary: int, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    row, mine = _rows(mesh, vocabulary, tokens)
    return _leave(mesh, forward(row) * mine.unsqueeze(-1))


def _loss(mesh: DeviceMesh, model: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, as ``Decoder.loss``, of logits (B, T, V) that no rank has whole."""
    logits = model(tokens).float()
    largest = logits.detach().amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, mesh.get_group())
    row, mine = _rows(mesh, model.config.vocab_size, targets)
    target = logits.gather(-1, row.unsqueeze(-1)).squeeze(-1) * mine
    sums = _leave(mesh, torch.stack([(logits - largest.unsqueeze(-1)).exp().sum(-1), target]))
    return (sums[0].log() + largest - sums[1]).mean()


def _rows(mesh: DeviceMesh, vocabulary: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of this rank's part of the vocabulary for token ids, 0 for those of others, and which are not."""
    rows, first = Shard.local_shard_size_and_offset(vocabulary, mesh.size(), mesh.get_local_rank())
    row = tokens - first
    mine = (row >= 0) & (row < rows)
    return row * mine, mine
