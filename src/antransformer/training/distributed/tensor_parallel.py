"""Tensor parallelism: heads, hidden coordinates of the MLP and vocabulary split over the ranks of a mesh.

The layout is that of arXiv:1909.08053. Projections that read the residual stream (qkv, up, gate) are split by rows, so
each rank computes its own heads and hidden coordinates. Projections that write to it (out, down) are split by columns,
and their outputs are summed over the ranks. Embedding and head are split by rows, that is, by token. The residual
stream itself is replicated.

Weights are DTensors, so bounds, optimizer and checkpoints know their layout. The forward pass computes with the local
shards as plain tensors. It communicates at the end of a sublayer, and in the backward pass at its beginning.
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


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split a model on the meta device over a one-dimensional mesh, in place.

    Arguments and result of ``loss`` stay the same. ``forward`` returns only the logits of this rank's tokens.
    """
    # Gathering a weight that two mesh axes split takes two collectives, of which DTensor warns. Only checkpoints do it.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    shard_dims = get(model.config.architecture).tensor_parallel
    distribute_module(model, mesh, partial(_distribute_weights, shard_dims))
    # FSDP changes classes, too. Wrappers around each instance would make torch.compile trace every block anew.
    for block in model.blocks:
        _specialize(block, SplitBlock, mesh)
        _specialize(block.get_submodule("attention"), SplitSublayer, mesh)
        _specialize(block.get_submodule("mlp"), SplitSublayer, mesh)
    _specialize(model.embedding, SplitEmbedding, mesh)
    _specialize(model, SplitDecoder, mesh)


def _distribute_weights(shard_dims: Mapping[str, int], name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    # Modules without an entry are replicated. The rows of qkv are ordered by head, so each rank gets complete heads.
    dim = shard_dims.get(name.rpartition(".")[2])
    if dim is not None:
        for key, weight in module.named_parameters(recurse=False):
            if weight.shape[dim] == 1:  # one s_Z for all ids
                continue
            module.register_parameter(key, nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)])))


def _specialize(module: nn.Module, mixin: type, mesh: DeviceMesh) -> None:
    """Change the class of ``module`` to a subclass whose forward pass is that of ``mixin``."""
    module.__class__ = _split_class(mixin, type(module), mesh)  # type: ignore[arg-type]  # classes are hashable


@cache
def _split_class(mixin: type, module_class: type, mesh: DeviceMesh) -> type:
    return type(f"{mixin.__name__}{module_class.__name__}", (mixin, module_class), {"mesh": mesh})


class SplitSublayer(nn.Module):
    """Attention or MLP; this rank computes some of the heads or hidden coordinates."""

    mesh: DeviceMesh

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Return the sublayer's output, summed over the ranks; input and output are (B, T, d) on every rank."""
        # Replicated weights, such as the scales of q and k, see only this rank's heads: their gradients are partial.
        with _local_weights(self, Partial()):
            return _reduce_from_ranks(self.mesh, super().forward(_copy_to_ranks(self.mesh, x), *args))


class SplitBlock(nn.Module):
    """Block; every rank computes its norms and residual updates."""

    def forward(self, *args: Any) -> Tensor:
        """Run the block's own forward pass with local weights."""
        # Every rank computes the same here, so the gradients of these weights are already complete.
        with _local_weights(self, Replicate(), exclude=("attention", "mlp")):
            y: Tensor = super().forward(*args)
            return y


class SplitEmbedding(nn.Embedding):
    """Embedding; this rank has the rows of some tokens."""

    mesh: DeviceMesh

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to embeddings (B, T, d), complete on every rank."""
        rows, is_local = _local_rows(self.mesh, self.num_embeddings, tokens)
        with _local_weights(self, Partial()):
            # Exactly one rank contributes the row of each token, all others zeros.
            return _reduce_from_ranks(self.mesh, super().forward(rows) * is_local.unsqueeze(-1))


class SplitDecoder(Decoder):
    """Decoder; this rank has the logits of some tokens."""

    mesh: DeviceMesh

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the residual stream (B, T, d) to the logits of this rank's tokens, (B, T, V / ranks)."""
        with _local_weights(self, Partial(), exclude=("embedding", "blocks")):
            return super().logits(_copy_to_ranks(self.mesh, hidden))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute ``Decoder.loss`` without gathering the logits: only sums over the vocabulary are exchanged."""
        logits = self(tokens).float()
        # The maximum only keeps exp() finite. It cancels in the loss, so it needs no gradient.
        maximum = logits.detach().amax(-1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, self.mesh.get_group())
        rows, is_local = _local_rows(self.mesh, self.config.vocab_size, targets)
        target_logits = logits.gather(-1, rows.unsqueeze(-1)).squeeze(-1) * is_local
        exp_sums = (logits - maximum.unsqueeze(-1)).exp().sum(-1)
        # Stacked, so that one collective serves both.
        sums = _reduce_from_ranks(self.mesh, torch.stack([exp_sums, target_logits]))
        loss: Tensor = (sums[0].log() + maximum - sums[1]).mean()
        return loss


@contextlib.contextmanager
def _local_weights(module: nn.Module, gradients: Placement, exclude: tuple[str, ...] = ()) -> Iterator[None]:
    """Replace the weights of ``module`` by this rank's shards, as plain tensors, while entered.

    Args:
        module: module whose weights are DTensors of the tensor-parallel mesh, unsharded by FSDP.
        gradients: placement of the gradients of replicated weights. Partial, if each rank uses them for its own heads
            or tokens; Replicate, if all ranks compute the same.
        exclude: names of children that are left unchanged.
    """
    children = [child for name, child in module.named_children() if name not in exclude]
    owners = [module, *(descendant for child in children for descendant in child.modules())]
    weights = [(vars(owner), *item) for owner in owners for item in owner.named_parameters(recurse=False)]
    for attributes, name, weight in weights:
        assert isinstance(weight, DTensor)
        (placement,) = weight.placements
        # An instance attribute hides the parameter of the same name, which stays registered with FSDP and optimizer.
        attributes[name] = weight.to_local(grad_placements=[gradients if placement.is_replicate() else placement])
    try:
        yield
    finally:
        for attributes, name, _ in weights:
            del attributes[name]


def _copy_to_ranks(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """Identity in the forward pass; all-reduces the gradient in the backward pass."""
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def _reduce_from_ranks(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """All-reduce in the forward pass; identity for the gradient in the backward pass."""
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


def _local_rows(mesh: DeviceMesh, vocab_size: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the local row of each token id (0 for tokens of other ranks), and a mask of this rank's tokens."""
    count, first = Shard.local_shard_size_and_offset(vocab_size, mesh.size(), mesh.get_local_rank())
    rows = tokens - first
    is_local = (rows >= 0) & (rows < count)
    return rows * is_local, is_local
