"""Transformer blocks and an encoder-decoder, built from the modules of ``nn``.

Inputs must have unit norm, and outputs have about unit norm. Embed ids with ``antransformer.nn.Embedding``; normalize
the projection of real-valued inputs exactly.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from antransformer.errors import ConfigError
from antransformer.nn import MLP, Attention, Residual


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each normalized and interpolated into the residual stream (arXiv:2505.22014, table 1).

    Args:
        attention: self-attention of width d. Causal attention makes this the block of a language model.
        mlp: any module that maps (B, T, d) to (B, T, d).

    Raises:
        TypeError: the first argument is not an ``antransformer.nn.Attention``.
        ConfigError: attention and MLP have different widths.

    >>> import torch
    >>> from antransformer.functional import normalize
    >>> from antransformer.nn import MLP
    >>> block = EncoderBlock(Attention(256, heads=4, rotary=1.0), MLP(256))
    >>> round(block(normalize(torch.randn(8, 20, 256))).norm(dim=-1).mean().item(), 1)
    1.0
    """

    def __init__(self, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        if not isinstance(attention, Attention):
            raise TypeError(f"a block begins with antransformer.nn.Attention, got {type(attention).__name__}")
        if isinstance(mlp, MLP):
            _require_width(mlp, attention.width)
        self.attention, self.mlp = attention, mlp
        self.attention_residual = Residual(attention.width)
        self.mlp_residual = Residual(attention.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d); mask as in ``Attention``."""
        x = self.attention_residual(x, self.attention(x, mask=mask))
        x = self.mlp_residual(x, self.mlp(x))
        return x


class DecoderBlock(EncoderBlock):
    """Self-attention, cross-attention to a memory, and MLP, each normalized and interpolated into the residual stream.

    Args:
        attention: self-attention, usually causal.
        cross: attention from the residual stream to the memory.
        mlp: as in ``EncoderBlock``.

    >>> import torch
    >>> from antransformer.functional import normalize
    >>> from antransformer.nn import MLP
    >>> block = DecoderBlock(Attention(256, heads=4, causal=True), Attention(256, heads=4), MLP(256))
    >>> x, memory = normalize(torch.randn(8, 20, 256)), normalize(torch.randn(8, 30, 256))
    >>> round(block(x, memory).norm(dim=-1).mean().item(), 1)
    1.0
    """

    def __init__(self, attention: Attention, cross: Attention, mlp: nn.Module) -> None:
        super().__init__(attention, mlp)
        if not isinstance(cross, Attention):
            raise TypeError(f"cross must be antransformer.nn.Attention, got {type(cross).__name__}")
        _require_width(cross, attention.width)
        self.cross = cross
        self.cross_residual = Residual(attention.width)

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Map the residual stream (B, T, d) and a memory (B, S, d) to (B, T, d); masks as in ``Attention``."""
        x = self.attention_residual(x, self.attention(x, mask=mask))
        x = self.cross_residual(x, self.cross(x, memory, memory_mask))
        x = self.mlp_residual(x, self.mlp(x))
        return x


def _require_width(module: Attention | MLP, width: int) -> None:
    if module.width != width:
        raise ConfigError(
            f"attention has width {width}, and {type(module).__name__} has {module.width}: give both the same width"
        )


class EncoderDecoder(nn.Module):
    """Encoder blocks over a source, followed by decoder blocks over a target with the encoded source as memory.

    Args:
        encoder: encoder blocks, in order.
        decoder: decoder blocks, in order.

    >>> import torch
    >>> from antransformer.functional import normalize
    >>> from antransformer.nn import MLP
    >>> encoder = [EncoderBlock(Attention(256, 4, rotary=0.5), MLP(256)) for _ in range(2)]
    >>> decoder = [DecoderBlock(Attention(256, 4, causal=True, rotary=0.5), Attention(256, 4), MLP(256))]
    >>> source, target = normalize(torch.randn(8, 30, 256)), normalize(torch.randn(8, 20, 256))
    >>> EncoderDecoder(encoder, decoder)(source, target).shape
    torch.Size([8, 20, 256])
    """

    def __init__(self, encoder: Iterable[EncoderBlock], decoder: Iterable[DecoderBlock]) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Map source (B, S, d) and target (B, T, d), embedded with unit norm, to (B, T, d).

        ``source_mask`` is as in ``Attention``.
        """
        for block in self.encoder:
            source = block(source, source_mask)
        for block in self.decoder:
            target = block(target, source, memory_mask=source_mask)
        return target
