"""Skeleton shared by all architectures: embedding, blocks, output head, loss, and the cache for generation."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import functional
from antransformer.bounds import Bound
from antransformer.functional import AttentionContext, LayerCache, Rotary
from antransformer.kernels.document_attention import document_mask, document_starts
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
    """Causal language model without its blocks, head and bounds, which a subclass adds.

    Args:
        config: sizes and options.
        block: constructor of a block, a module that maps (hidden (B, T, d), ctx) to hidden. Its attention must use
            ``ctx.rotary`` and ``functional.causal_attention``, which fills and reads the cache of generation.

    Attributes:
        end_of_text: id of the token that separates documents, if attention must not cross it; None, the default, for
            attention to all preceding tokens. Generation with a cache ignores it.
    """

    end_of_text: int | None = None

    def __init__(self, config: ModelConfig, block: Callable[[ModelConfig], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))

    @abstractmethod
    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return (hidden (..., d), weight (V, d)) such that logits = hidden @ weight.T.

        Logits are not computed here, since ``functional.cross_entropy`` computes them in chunks.
        """

    @abstractmethod
    def bounds(self) -> list[Bound]:
        """Constraints on the weights; an empty list for a model without bounds."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to the residual stream before the first block (B, T, d)."""
        x: Tensor = self.embedding(tokens)
        return x

    def hidden(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Map token ids (B, T) to the residual stream after the last block (B, T, d).

        With a cache the tokens continue its sequences, and their keys and values are appended to it.

        Raises:
            ValueError: the sequence is longer than the context, or an id is outside the vocabulary. Ids are checked on
                CPUs only, since accelerators raise an error of their own.
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
        """Positions and visible keys of tokens (B, T) that continue the sequences of the cache."""
        if cache is not None:
            return cache.attention_context(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        starts = mask = None
        if self.end_of_text is not None:
            starts = document_starts(tokens, self.end_of_text)
            # Not only distances matter: nGPT scales coordinates after their rotation.
            positions, mask = positions - starts, document_mask(starts)
        rotary = functional.rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta)
        return AttentionContext(rotary, mask, starts=starts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the residual stream after the last block (..., d) to logits (..., V)."""
        return F.linear(*self.head(hidden))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of token ids (B, T), or the loss for targets; raises the errors of ``hidden``."""
        hidden = self.hidden(tokens)
        return self.logits(hidden) if targets is None else functional.cross_entropy(*self.head(hidden), targets)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` (B, T) given ``tokens`` (B, T); raises the errors of ``hidden``."""
        # Through __call__, since FSDP gathers weights in hooks of the forward pass.
        loss: Tensor = self(tokens, targets)
        return loss

    def parameter_count(self) -> int:
        """Number of learnable parameters, in scalars."""
        return sum(parameter.numel() for parameter in self.parameters())


class Cache:
    """Key-value cache of all layers for generation without gradients.

    Args:
        model: model that uses the cache; its embedding gives the dtype and the device.
        batch: number of sequences.
        padding: number of padding tokens on the left of each sequence (B,), or None for no padding.
    """

    def __init__(self, model: Decoder, batch: int, padding: Tensor | None = None) -> None:
        config, weight = model.config, model.embedding.weight
        # Contiguous positions within each head, the layout that attention reads fastest.
        shape = (config.layers, 2, batch, config.heads, config.context, config.head_dim)
        buffer = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.layers = [layer.transpose(2, 3).unbind() for layer in buffer]
        self.positions = torch.arange(config.context, device=weight.device)
        tables = functional.rotary_tables(self.positions, config.rotary_dim, config.rope_theta)
        self.rotary = Rotary(*(table.to(weight.dtype) for table in tables))
        self.padding = padding
        self.length = 0

    def layer(self, index: int) -> LayerCache:
        """Keys and values of the block with this index."""
        k, v = self.layers[index]
        return LayerCache(k, v, self.length)

    def attention_context(self, steps: int) -> AttentionContext:
        """Positions and visible keys of the next ``steps`` tokens."""
        if self.padding is None and (steps == 1 or not self.length):
            cos, sin = self.rotary
            return AttentionContext(Rotary(cos.narrow(0, self.length, steps), sin.narrow(0, self.length, steps)))
        keys = self.positions[: self.length + steps]
        queries = keys[self.length :]
        mask = (keys <= queries.unsqueeze(-1))[None, None]
        if self.padding is not None:
            # No token sees padding, except a padding token itself: softmax over no keys would be NaN.
            is_text = keys >= self.padding[:, None, None, None]
            mask = (mask & is_text) | (keys == queries.unsqueeze(-1))
            queries = (queries - self.padding.unsqueeze(-1)).clamp_min(0)
        return AttentionContext(Rotary(self.rotary.cos[queries], self.rotary.sin[queries]), mask)


def check_tokens(tokens: Tensor, config: ModelConfig, cached: int = 0) -> None:
    """Check length and ids of tokens (B, T) that follow ``cached`` ones.

    Raises:
        ValueError: see ``Decoder.hidden``.
    """
    length = cached + tokens.shape[-1]
    if length > config.context:
        raise ValueError(f"a sequence of {length} tokens is longer than the context of {config.context}")
    # On other devices reading the ids would wait for the device.
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = (int(token) for token in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
