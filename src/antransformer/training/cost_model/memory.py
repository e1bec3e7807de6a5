"""Model of the memory that a training step needs on each device; docs/planning.md compares it with measurements.

Activations are not estimated by formulas: one block of the real model runs on fake tensors, and the bytes that autograd
saves for the backward pass are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from antransformer.functional import AttentionContext, cross_entropy, rotary_tables
from antransformer.kernels.chunked_cross_entropy import LARGE_CHUNK
from antransformer.models import Decoder, ModelConfig, build
from antransformer.training.device import autocast

FLOAT32_BYTES = 4  # parameters, gradients and both Adam moments are float32 in any precision
LOGIT_BYTES = 3 * 4  # float32 exponentials, and the gradients before and after the softmax


@dataclass(frozen=True)
class Layout:
    """Distribution of the training of one model over devices.

    Attributes:
        strategy: ddp, fsdp or hsdp, as ``TrainConfig.parallel``.
        devices: number of devices.
        gpus_per_node: number of devices in one node.
        tensor_parallel: number of devices that split each layer.
        checkpointing: whether activations are recomputed block by block.
        micro_batch_size: sequences in one forward pass of a device.
        grad_accum_steps: forward passes of a step.
    """

    strategy: str = "ddp"
    devices: int = 1
    gpus_per_node: int = 8
    tensor_parallel: int = 1
    checkpointing: bool = False
    micro_batch_size: int = 1
    grad_accum_steps: int = 1

    @property
    def data_parallel_size(self) -> int:
        """Number of devices, or tensor-parallel groups, with different data."""
        return self.devices // self.tensor_parallel

    @property
    def shards(self) -> int:
        """Number of data-parallel shards of each parameter."""
        within_node = max(1, min(self.gpus_per_node, self.devices) // self.tensor_parallel)
        return {"ddp": 1, "hsdp": within_node, "fsdp": self.data_parallel_size}[self.strategy]

    @property
    def batch_size(self) -> int:
        """Sequences of a step, on all devices."""
        return self.data_parallel_size * self.grad_accum_steps * self.micro_batch_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step.

    Attributes:
        parameters: float32 parameters, this device's shard.
        gradients: float32 gradients that are held over a backward pass.
        optimizer: float32 Adam moments, this device's shard.
        weight_copies: half-precision weights and the scaled head, saved for the backward pass.
        gathered: parameters and gradients of other devices, for the blocks in progress.
        activations: tensors saved in the blocks for the backward pass.
        logits: tensors saved in the head, and the workspace of the loss.
    """

    parameters: float
    gradients: float
    optimizer: float
    weight_copies: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of all fields."""
        total: float = sum(vars(self).values())
        return total


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that autograd saves for the backward pass of a module.

    Attributes:
        per_token: bytes per token.
        unsharded_per_token: the part of ``per_token`` with the width of the residual stream, which tensor parallelism
            does not split.
        fixed: bytes that do not depend on the number of tokens.
    """

    per_token: float
    unsharded_per_token: float
    fixed: float

    def of_tokens(self, tokens: int, tensor_parallel: int) -> float:
        """Return the bytes of ``tokens`` tokens on one of ``tensor_parallel`` devices, without the fixed part."""
        return tokens * (self.unsharded_per_token + (self.per_token - self.unsharded_per_token) / tensor_parallel)


def estimate_memory(config: ModelConfig, layout: Layout, precision: torch.dtype) -> Memory:
    """Estimate the memory at the peak of a step.

    The peak is the larger of two moments: the loss, and the end of the backward pass, in the first block.

    Args:
        config: model.
        layout: distribution over devices.
        precision: dtype of the matrix products.
    """
    distributed, tensor_parallel = layout.devices > 1, layout.tensor_parallel
    # FSDP casts parameters, so the residual stream has their precision; under autocast it stays float32.
    stream_bytes = precision.itemsize if distributed else FLOAT32_BYTES
    block, root = block_parameters(config)
    block_saved, head_saved = saved_activations(config, precision, distributed)
    blocks = config.layers * block
    parameters = FLOAT32_BYTES * (blocks + root) / (tensor_parallel * layout.shards)
    # FSDP keeps unsharded gradients until the last micro-batch, since only that one reduces them.
    unsharded = FLOAT32_BYTES * (blocks + root) / tensor_parallel if distributed else parameters
    accumulated = unsharded if layout.grad_accum_steps > 1 else 0.0
    # FSDP's root module, with embedding and head, stays gathered for the whole step.
    gathered = stream_bytes * root / tensor_parallel if distributed else 0.0
    tokens = layout.micro_batch_size * config.context
    block_input, in_block = tokens * config.width * stream_bytes, block_saved.of_tokens(tokens, tensor_parallel)
    of_loss = head_saved.of_tokens(tokens, tensor_parallel) + loss_workspace(config, tokens, precision, tensor_parallel)
    weight_copies = head_saved.fixed / tensor_parallel
    if not layout.checkpointing:
        weight_copies += config.layers * block_saved.fixed / tensor_parallel
    # At the loss the activations of all blocks are saved, with checkpointing only their inputs.
    at_loss = Memory(
        parameters=parameters,
        gradients=accumulated,
        optimizer=2 * parameters,
        weight_copies=weight_copies,
        gathered=gathered,
        activations=config.layers * (block_input if layout.checkpointing else in_block),
        logits=of_loss,
    )
    # One block in progress, the next one prefetched; its gradients as computed and as they are reduced.
    in_progress = (stream_bytes * (root + 3 * block) + FLOAT32_BYTES * block) / tensor_parallel if distributed else 0.0
    # On one device the gradient of the embedding, which comes last, represents the workspace of the backward pass.
    reduced = FLOAT32_BYTES * blocks / (tensor_parallel * layout.shards) if distributed else parameters
    # At the end one block's activations are left, saved or recomputed, and all gradients have been computed.
    at_end = Memory(
        parameters=parameters,
        gradients=accumulated or reduced,
        optimizer=2 * parameters,
        weight_copies=block_saved.fixed / tensor_parallel,
        gathered=gathered + in_progress,
        activations=in_block + block_input,
        logits=0.0,
    )
    return max(at_loss, at_end, key=lambda memory: memory.total)


def loss_workspace(config: ModelConfig, tokens: int, precision: torch.dtype, tensor_parallel: int) -> float:
    """Return the largest temporary memory of the loss or of its backward pass, in bytes."""
    if tensor_parallel > 1:
        # Not chunked: logits of all tokens, for this device's part of the vocabulary.
        return tokens * LOGIT_BYTES * config.vocab_size / tensor_parallel
    # A chunk of logits, which a GPU's kernel replaces by their gradients, or the scaled gradient of the head.
    chunk = min(tokens, LARGE_CHUNK) * precision.itemsize * config.vocab_size
    return max(chunk, FLOAT32_BYTES * config.vocab_size * config.width)


@cache
def block_parameters(config: ModelConfig) -> tuple[int, int]:
    """Return the number of learnable parameters of one block, and of everything outside the blocks."""
    model = _one_block_model(config)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return block, model.parameter_count() - block


@cache
def saved_activations(
    config: ModelConfig, precision: torch.dtype, distributed: bool
) -> tuple[SavedActivations, SavedActivations]:
    """Measure what autograd saves of a block, and of the head with the loss, without the parameters themselves.

    Args:
        config: model.
        precision: dtype of the matrix products.
        distributed: whether FSDP casts the parameters to ``precision``, instead of autocast.
    """
    model = _one_block_model(config)
    dtype = precision if distributed else torch.float32
    length = config.context

    def measure_block(batch: int) -> tuple[int, int]:
        x = torch.empty(batch, length, config.width, dtype=dtype, requires_grad=True)
        tables = rotary_tables(torch.arange(length), config.rotary_dim, config.rope_theta)
        return _saved_bytes(model.blocks[0], (x, AttentionContext(tables)), dtype)

    def measure_head(batch: int) -> tuple[int, int]:
        x = torch.empty(batch, length, config.width, dtype=dtype, requires_grad=True)
        return _saved_bytes(_HeadLoss(model), (x, torch.empty(batch, length, dtype=torch.long)), dtype)

    def fit(measure: Callable[[int], tuple[int, int]]) -> SavedActivations:
        # Bytes are linear in the batch size: two measurements give slope and intercept.
        with FakeTensorMode(), autocast(torch.device("cpu"), precision):
            (one, unsharded), (two, _) = measure(1), measure(2)
        return SavedActivations((two - one) / length, unsharded / length, 2 * one - two)

    return fit(measure_block), fit(measure_head)


class _HeadLoss(nn.Module):
    """Head of a model with its loss."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of token ids ``targets`` (B, T), given the residual stream (B, T, d)."""
        return cross_entropy(*self.model.head(hidden), targets)


@cache
def _one_block_model(config: ModelConfig) -> Decoder:
    """Return the model with a single block, on the meta device: all blocks are equal."""
    with torch.device("meta"):
        return build(replace(config, layers=1))


def _saved_bytes(module: nn.Module, inputs: tuple[Tensor, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that autograd saves in a call without the parameters, and those of input-shaped tensors."""
    weights = {
        name: torch.empty(parameter.shape, dtype=dtype, requires_grad=True)
        for name, parameter in module.named_parameters()
    }
    # Identified by storage, because views share the memory of their base. Counted once, though several nodes save it.
    weight_storages = {weight.untyped_storage()._cdata for weight in weights.values()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weight_storages:
            saved[storage] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        functional_call(module, weights, inputs)
    sizes = {storage: tensor.untyped_storage().nbytes() for storage, tensor in saved.items()}
    unsharded = sum(sizes[storage] for storage, tensor in saved.items() if tensor.shape == inputs[0].shape)
    return sum(sizes.values()), unsharded
