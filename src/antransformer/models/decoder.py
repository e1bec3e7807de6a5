"""What the three architectures share: embed, blocks, head, loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from antransformer import functional
from antransformer.bounds import Bound
from antransformer.models.config import ModelConfig


class Decoder(nn.Module, ABC):
    """Skeleton of a causal language model; a subclass adds its blocks, its head and its bounds.

    Args:
        config: sizes and options.
        block: makes one block; a block maps (hidden (B, T, d), rotary tables) to hidden.
    """

    def __init__(self, config: ModelConfig, block: Callable[[ModelConfig], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Residual stream (B, T, d) to logits (B, T, V)."""

    @abstractmethod
    def bounds(self) -> list[Bound]:
        """The constraints on the weights; empty for a model without."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to the residual stream after the last block, (B, T, d).

        Raises:
            ValueError: more tokens than the context, or an id outside the vocabulary (the latter is checked on a CPU;
                an accelerator reports it by itself).
        """
        check_tokens(tokens, self.config)
        x = self.embedding(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rotary = functional.rotary_tables(positions, self.config.rotated, self.config.rotary_base)
        for block in self.blocks:
            x = block(x, rotary)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to logits (B, T, V); raises as ``hidden``."""
        return self.logits(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` (B, T) given ``tokens`` (B, T); raises as ``hidden``."""
        return functional.cross_entropy(self(tokens), targets)

    def parameter_count(self) -> int:
        """Number of learnable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


def check_tokens(tokens: Tensor, config: ModelConfig) -> None:
    """Refuse what the model can not embed, in words.

    Raises:
        ValueError: see ``Decoder.hidden``.
    """
    if tokens.shape[-1] > config.context:
        raise ValueError(f"a sequence of {tokens.shape[-1]} tokens is longer than the context of {config.context}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = tokens.aminmax()
        if low < 0 or high >= config.vocab_size:
            bad = int(low if low < 0 else high)
            raise ValueError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")
