"""Causal attention that does not cross documents: FlexAttention on CUDA, ``cpu_attention`` on a CPU, else masks.

FlexAttention skips blocks of the mask in which no key is visible, and so does ``cpu_attention`` on a CPU, without a
mask. Dense masks are for torch's fused attention on other devices, which computes all scores.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def document_starts(tokens: Tensor, end_of_text: int) -> Tensor:
    """Position (B, T) of the first token of each token's document.

    Args:
        tokens: token ids (B, T).
        end_of_text: id of the token that begins each document. It is the one that ends the document before.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    starts: Tensor = torch.where(tokens == end_of_text, positions, 0).cummax(1).values
    return starts


def document_mask(starts: Tensor) -> Tensor | BlockMask | None:
    """Mask of causal attention within documents (``document_starts``); None on a CPU, which does not need one."""
    if starts.is_cpu:
        return None
    return block_mask(starts) if starts.is_cuda else dense_mask(starts)


def dense_mask(starts: Tensor) -> Tensor:
    """Boolean mask (B, 1, T, T), true where a key is visible."""
    positions = torch.arange(starts.shape[1], device=starts.device)
    return (starts.unsqueeze(-1) <= positions).tril().unsqueeze(1)


def block_mask(starts: Tensor) -> BlockMask:
    """The mask of ``dense_mask`` for FlexAttention."""

    def is_visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[batch, query] <= key) & (key <= query)

    rows, length = starts.shape
    create = _fused(create_block_mask, starts)
    mask: BlockMask = create(is_visible, rows, None, length, length, device=starts.device)
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention softmax(scale * q k^T) v under a block mask, of q, k and v (B, T, n, h); same shape."""
    # Contiguous, since compiled FlexAttention can return wrong values for views: torch 2.13 does so on CPUs, and an
    # earlier release computed wrong gradients on GPUs (pytorch/pytorch#146377).
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    y: Tensor = _fused(flex_attention, q)(q, k, v, block_mask=mask, scale=scale)
    return y.transpose(1, 2)


def _fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function as a fused kernel on a CUDA device: only the compiler makes one of FlexAttention."""
    return _compiled(function) if x.is_cuda and not torch.compiler.is_compiling() else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
