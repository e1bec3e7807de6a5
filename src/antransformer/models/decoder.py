"""What all architectures share: embed, blocks, head, loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import functional
from antransformer.bounds import Bound
from antransformer.functional import AttentionContext, LayerCache, Rotary
from antransformer.models.config import ModelConfig

# Axis along which tensor parallelism splits the weights of a module, by the module's name. All others are replicated.
TENSOR_PARALLEL = {
    "embedding": 0,
    "qkv_proj": 0,  # its rows are ordered head by head
    "out_proj": 1,
    "up_proj": 0,
    "gate_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
}


class Decoder(nn.Module, ABC):
    """Skeleton of a causal language model; a subclass adds its blocks, its head and its bounds.

    Args:
        config: sizes and options.
        block: makes one block; a block maps (hidden (B, T, d), ctx) to hidden.
    """

    def __init__(self, config: ModelConfig, block: Callable[[ModelConfig], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))

    @abstractmethod
    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Whose product the logits are: the residual stream (..., d) as the head reads it, and a weight (V, d)."""

    @abstractmethod
    def bounds(self) -> list[Bound]:
        """The constraints on the weights; empty for a model without."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to the residual stream before the first block, (B, T, d)."""
        return self.embedding(tokens)

    def hidden(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Token ids (B, T) to the residual stream after the last block, (B, T, d).

        With a cache the tokens follow those that it holds, and it holds them too afterwards.

        Raises:
            ValueError: more tokens than the context, or an id outside the vocabulary (the latter is checked on a CPU;
                an accelerator reports it by itself).
        """
        check_tokens(tokens, self.config, cache.length if cache else 0)
        x = self.embed(tokens)
        ctx = self.attention_context(tokens, cache)
        for index, block in enumerate(self.blocks):
            x = block(x, ctx if cache is None else ctx._replace(kv_cache=cache.layer(index)))
        if cache is not None:
            cache.length += tokens.shape[1]
        return x

    def attention_context(self, tokens: Tensor, cache: "Cache | None") -> AttentionContext:
        """Positions and visibility of new tokens (B, T), behind those of the cache."""
        if cache is not None:
            return cache.attention_context(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return AttentionContext(functional.rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta))

    def logits(self, hidden: Tensor) -> Tensor:
        """Residual stream (..., d) to logits (..., V)."""
        return F.linear(*self.head(hidden))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, T) to logits (B, T, V), or with targets to their ``loss``; raises as ``hidden``."""
        hidden = self.hidden(tokens)
        return self.logits(hidden) if targets is None else functional.cross_entropy(*self.head(hidden), targets)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` (B, T) given ``tokens`` (B, T); raises as ``hidden``."""
        return self(tokens, targets)  # through forward, where sharded training begins and ends

    def parameter_count(self) -> int:
        """Number of learnable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


class Cache:
    """Keys and values of all layers for a batch that grows token by token, without gradients.

    Args:
        model: the model that it is for; dtype and device are those of its embedding.
        batch: number of sequences.
        padding: (B,) number of padding tokens on the left of each, or None for none.
    """

    def __init__(self, model: Decoder, batch: int, padding: Tensor | None = None) -> None:
        config, weight = model.config, model.embedding.weight
        # In memory the keys of a head lie together, position by position: so attention reads them fastest.
        shape = (config.layers, 2, batch, config.heads, config.context, config.head_dim)
        store = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.layers = [layer.transpose(2, 3).unbind() for layer in store]
        self.positions = torch.arange(config.context, device=weight.device)
        tables = functional.rotary_tables(self.positions, config.rotary_dim, config.rope_theta)
        self.rotary = Rotary(*(table.to(weight.dtype) for table in tables))
        self.padding = padding
        self.length = 0

    def layer(self, index: int) -> LayerCache:
        """The part of one block."""
        k, v = self.layers[index]
        return LayerCache(k, v, self.length)

    def attention_context(self, steps: int) -> AttentionContext:
        """Positions and visibility of so many tokens behind those that are there."""
        if self.padding is None and (steps == 1 or not self.length):
            cos, sin = self.rotary
            return AttentionContext(Rotary(cos.narrow(0, self.length, steps), sin.narrow(0, self.length, steps)))
        seen = self.positions[: self.length + steps]
        new = seen[self.length :]
        mask = (seen <= new.unsqueeze(-1))[None, None]
        if self.padding is not None:
            # A padding token sees itself, since softmax over nothing is not a number; nobody sees it.
            begun = seen >= self.padding[:, None, None, None]
            mask = (mask & begun) | (seen == new.unsqueeze(-1))
            new = (new - self.padding.unsqueeze(-1)).clamp_min(0)
        return AttentionContext(Rotary(self.rotary.cos[new], self.rotary.sin[new]), mask)


def check_tokens(tokens: Tensor, config: ModelConfig, before: int = 0) -> None:
    """Refuse what the model can not embed, in words.

    Raises:
        ValueError: see ``Decoder.hidden``.
    """
    length = before + tokens.shape[-1]
    if length > config.context:
        raise ValueError(f"a sequence of {length} tokens is longer than the context of {config.context}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = (int(token) for token in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")
