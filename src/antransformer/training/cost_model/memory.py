"""What a training step needs of each device's memory: a model of it, checked against measurement in docs/scaling.md.

What the backward pass keeps of a block and of the head is not estimated: one block of the real model runs on tensors
without values, and the bytes that autograd saves are counted.
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

from antransformer.functional import LARGE_CHUNK, AttentionContext, cross_entropy, rotary_tables
from antransformer.models import Decoder, ModelConfig, build
from antransformer.training.device import autocast

WEIGHT = 4  # bytes of a float32: parameters, gradients and both moments of Adam are such, in any precision
WHOLE_LOGIT = 3 * 4  # bytes: the float32 exponential, the gradients before and behind the softmax


@dataclass(frozen=True)
class Layout:
    """How devices share the training of one model.

    Attributes:
        way: ddp, fsdp or hsdp, as in ``TrainConfig.parallel``.
        devices: how many.
        node: of them in one machine.
        tensor: devices that share each matrix product; data parallelism is over the rest.
        checkpointing: whether each block is computed again in the backward pass.
        micro_batch_size: sequences in one forward pass of a device.
        passes: forward passes of a step.
    """

    way: str = "ddp"
    devices: int = 1
    node: int = 8
    tensor: int = 1
    checkpointing: bool = False
    micro_batch_size: int = 1
    passes: int = 1

    @property
    def copies(self) -> int:
        """Groups of devices that see different sequences."""
        return self.devices // self.tensor

    @property
    def shards(self) -> int:
        """Parts that the parameters of a tensor-parallel rank are split into."""
        in_machine = max(1, min(self.node, self.devices) // self.tensor)
        return {"ddp": 1, "hsdp": in_machine, "fsdp": self.copies}[self.way]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, at the moment of a step when they are most.

    Attributes:
        parameters, gradients, optimizer: in float32, this device's part.
        copies: of weights in half precision, and of the head scaled, that the backward pass needs.
        gathered: parameters and gradients of other devices, of the blocks that are being computed.
        activations: what the backward pass needs of the blocks.
        logits: the same of the head, and the gradients of the loss.
    """

    parameters: float
    gradients: float
    optimizer: float
    copies: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that autograd keeps of a module.

    Attributes:
        token: for each token.
        whole: of these, what is as wide as the model.
        once: whatever the number of tokens.
    """

    token: float
    whole: float
    once: float

    def of_tokens(self, tokens: int, tensor: int) -> float:
        """Those of so many tokens, of which tensor-parallel devices share what is not as wide as the model."""
        return tokens * (self.whole + (self.token - self.whole) / tensor)


def memory(config: ModelConfig, layout: Layout, precision: torch.dtype) -> Memory:
    """The model of the peak: the larger of two moments, the loss and the backward pass of the first block.

    With accumulation FSDP keeps the sum of the gradients whole on each device until the last pass.

    Args:
        config: sizes.
        layout: how devices share it.
        precision: of the matrix products.
    """
    distributed, tensor = layout.devices > 1, layout.tensor
    size = precision.itemsize if distributed else WEIGHT  # bytes of a number between blocks
    block, root = block_parameters(config)
    inside, head = saved_activations(config, precision, distributed)
    blocks = config.layers * block
    own = WEIGHT * (blocks + root) / (tensor * layout.shards)
    accumulated = (WEIGHT * (blocks + root) / tensor if distributed else own) if layout.passes > 1 else 0.0
    gathered = size * root / tensor if distributed else 0.0
    # One block computed, the next one fetched; gradients as they come and as they are summed.
    working = (size * (root + 3 * block) + WEIGHT * block) / tensor if distributed else 0.0
    tokens = layout.micro_batch_size * config.context
    between, within = tokens * config.width * size, inside.of_tokens(tokens, tensor)
    of_loss = head.of_tokens(tokens, tensor) + loss_workspace(config, tokens, precision, tensor)
    of_head = head.once / tensor
    if layout.checkpointing:
        at_loss = Memory(own, accumulated, 2 * own, of_head, gathered, config.layers * between, of_loss)
    else:
        scaled = config.layers * inside.once / tensor
        at_loss = Memory(own, accumulated, 2 * own, of_head + scaled, gathered, config.layers * within, of_loss)
    # Alone, the embedding's gradient, which comes last, stands for what is computed in between.
    gradients = accumulated or (WEIGHT * blocks / (tensor * layout.shards) if distributed else own)
    at_end = Memory(own, gradients, 2 * own, inside.once / tensor, gathered + working, within + between, 0.0)
    return max(at_loss, at_end, key=lambda it: it.total)


def loss_workspace(config: ModelConfig, tokens: int, precision: torch.dtype, tensor: int) -> float:
    """Bytes that the loss takes while it is computed, or its backward pass, whichever are more.

    A chunk of logits in the products' precision with log-probabilities in float32, then the scaled gradient of the
    head's weight. Tensor-parallel devices have the logits of all tokens, for their part of the vocabulary.
    """
    if tensor > 1:
        return tokens * WHOLE_LOGIT * config.vocab_size / tensor
    chunk = min(tokens, LARGE_CHUNK) * (precision.itemsize + WEIGHT) * config.vocab_size
    return max(chunk, WEIGHT * config.vocab_size * config.width)


@cache
def block_parameters(config: ModelConfig) -> tuple[int, int]:
    """Learnable numbers of one block, and of all that is in no block."""
    model = _skeleton(config)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return block, model.parameter_count() - block


@cache
def saved_activations(
    config: ModelConfig, precision: torch.dtype, distributed: bool
) -> tuple[SavedActivations, SavedActivations]:
    """What the backward pass needs of a block, and of the head with the loss, beside the parameters themselves.

    Args:
        config: sizes.
        precision: of the matrix products.
        distributed: whether FSDP casts the parameters, in place of autocast.
    """
    model = _skeleton(config)
    dtype = precision if distributed else torch.float32
    length = config.context

    def block(batch: int) -> tuple[int, int]:
        x = torch.empty(batch, length, config.width, dtype=dtype, requires_grad=True)
        tables = rotary_tables(torch.arange(length), config.rotary_dim, config.rope_theta)
        return _saved(model.blocks[0], (x, AttentionContext(tables)), dtype)

    def head(batch: int) -> tuple[int, int]:
        x = torch.empty(batch, length, config.width, dtype=dtype, requires_grad=True)
        return _saved(_Head(model), (x, torch.empty(batch, length, dtype=torch.long)), dtype)

    def per_token(count: Callable[[int], tuple[int, int]]) -> SavedActivations:
        with FakeTensorMode(), autocast(torch.device("cpu"), precision):
            (one, whole), (two, _) = count(1), count(2)
        return SavedActivations((two - one) / length, whole / length, 2 * one - two)

    return per_token(block), per_token(head)


class _Head(nn.Module):
    """The part of a model behind its blocks."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Residual stream and token ids to the loss."""
        return cross_entropy(*self.model.head(hidden), targets)


@cache
def _skeleton(config: ModelConfig) -> Decoder:
    """The model with one block, without memory."""
    with torch.device("meta"):
        return build(replace(config, layers=1))


def _saved(module: nn.Module, inputs: tuple[Tensor, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that autograd saves in a call of the module, parameters apart: all, and what is shaped as the input is."""
    weights = {name: torch.empty(it.shape, dtype=dtype, requires_grad=True) for name, it in module.named_parameters()}
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            found[place] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        functional_call(module, weights, inputs)
    sizes = {place: it.untyped_storage().nbytes() for place, it in found.items()}
    return sum(sizes.values()), sum(sizes[place] for place, it in found.items() if it.shape == inputs[0].shape)
