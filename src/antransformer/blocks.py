"""Whole blocks, and an encoder-decoder, from the modules of ``nn``.

What goes in has unit norm, and what comes out about unit norm: embed ids with ``nn.Embedding``, and put an exact norm
behind the projection of real-valued inputs.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from antransformer.nn import Attention, Residual


class EncoderBlock(nn.Module):
    """Attention and MLP, each normalized exactly and interpolated into the stream (arXiv:2505.22014, table 1).

    Args:
        attention: of the width d; a causal one makes this the block of a language model.
        mlp: of the same width; any module that maps (B, T, d) to (B, T, d) will do.

    >>> import torch
    >>> from antransformer.functional import normalize
    >>> from antransformer.nn import MLP
    >>> block = EncoderBlock(Attention(256, heads=4, rotary=1.0), MLP(256))
    >>> round(block(normalize(torch.randn(8, 20, 256))).norm(dim=-1).mean().item(), 1)
    1.0
    """

    def __init__(self, attention: Attention, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_residual = Residual(attention.width)
        self.mlp_residual = Residual(attention.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Residual stream (B, T, d) to the same; mask as in ``Attention``."""
        x = self.attention_residual(x, self.attention(x, mask=mask))
        return self.mlp_residual(x, self.mlp(x))


class DecoderBlock(EncoderBlock):
    """An encoder block with cross-attention between its two parts.

    Args:
        attention: among the tokens of the stream, as a rule causal.
        cross: from them to the memory.
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
        self.cross = cross
        self.cross_residual = Residual(attention.width)

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Residual stream (B, T, d) and memory (B, S, d) to the stream; masks as in ``Attention``."""
        x = self.attention_residual(x, self.attention(x, mask=mask))
        x = self.cross_residual(x, self.cross(x, memory, memory_mask))
        return self.mlp_residual(x, self.mlp(x))


class EncoderDecoder(nn.Module):
    """Encoder blocks over a source, then decoder blocks over a target that look at what the encoder made of it.

    Args:
        encoder: the blocks, in order.
        decoder: the same.

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
        """Embedded source (B, S, d) and target (B, T, d), of unit norm, to (B, T, d); mask as in ``Attention``."""
        for block in self.encoder:
            source = block(source, source_mask)
        for block in self.decoder:
            target = block(target, source, memory_mask=source_mask)
        return target
