"""Causal attention on a CPU, as matrix products over blocks of queries: in bfloat16, and within documents.

torch's fused kernel (2.13) does not use the bfloat16 instructions of the processor, which these products use. With
documents, a block has only keys that its first query sees, or later ones. The probabilities of a block are computed
again for backward, so memory is linear in the number of tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

ROWS = 128  # queries in a block


def is_supported(q: Tensor, k: Tensor) -> bool:
    """Whether ``causal`` is faster than torch's kernel on q and k (B, T, n, h): bfloat16, with a key for each query.

    Fake tensors are not taken, since estimates of memory make them on a CPU and mean a GPU.
    """
    # Under autocast, keys from a float32 cache have another dtype than the queries.
    fits = q.device.type == "cpu" and q.dtype == k.dtype == torch.bfloat16 and q.shape == k.shape
    return fits and not isinstance(q, FakeTensor)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
    """Attention softmax(scale * q k^T) v, causal, of q, k and v (B, T, n, h); same shape and dtype.

    With ``starts`` (B, T), the position of the first token of each token's document, it does not cross documents.
    """
    batch, _, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y: Tensor = _causal(q, k, v, scale, starts).unflatten(0, (batch, heads)).transpose(1, 2)
    return y


class Tile(NamedTuple):
    """A block of queries with its keys, of some of the B * n sequences of heads, and the mask that is added to scores.

    Without documents a tile has all sequences, with documents those of one row of the batch.
    """

    sequences: slice
    queries: slice
    keys: slice
    mask: Tensor

    def of(self, queries: Tensor, *keys: Tensor) -> list[Tensor]:
        """Views of tensors (B * n, T, h) on this tile: of the first at its queries, of all others at its keys."""
        return [queries[self.sequences, self.queries], *(x[self.sequences, self.keys] for x in keys)]


def _tiles(q: Tensor, starts: Tensor | None) -> Iterator[Tile]:
    for start in range(0, q.shape[1], ROWS):
        end = min(start + ROWS, q.shape[1])
        mask = torch.full((end - start, end), -torch.inf, dtype=q.dtype).triu_(start + 1)
        if starts is None:
            yield Tile(slice(None), slice(start, end), slice(end), mask)
            continue
        heads = len(q) // len(starts)
        for row, firsts in enumerate(starts[:, start:end]):
            first = int(firsts[0])  # starts do not decrease: all queries of the block see only keys from here on
            hidden = torch.arange(first, end) < firsts.unsqueeze(1)
            sequences = slice(row * heads, (row + 1) * heads)
            yield Tile(sequences, slice(start, end), slice(first, end), mask[:, first:].masked_fill(hidden, -torch.inf))


def _probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attention probabilities (sequences, queries, keys) of a tile."""
    return torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)


# Custom operators, since torch.compile would unroll the loops over tiles.
@torch.library.custom_op("antransformer::cpu_attention", mutates_args=(), device_types="cpu")
def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    y = torch.empty_like(v)
    for tile in _tiles(q, starts):
        tile_q, tile_k, tile_v = tile.of(q, k, v)
        torch.bmm(_probabilities(tile_q, tile_k, scale, tile.mask), tile_v, out=tile.of(y)[0])
    return y


@torch.library.custom_op("antransformer::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in _tiles(q, starts):
        tile_q, tile_k, tile_v, tile_grad_k, tile_grad_v = tile.of(q, k, v, grad_k, grad_v)
        tile_grad, tile_grad_q = tile.of(grad)[0], tile.of(grad_q)[0]
        probabilities = _probabilities(tile_q, tile_k, scale, tile.mask)
        tile_grad_v.baddbmm_(probabilities.mT, tile_grad)
        grad_scores = torch._softmax_backward_data(tile_grad @ tile_v.mT, probabilities, -1, q.dtype)
        torch.baddbmm(q.new_zeros(1), grad_scores, tile_k, beta=0, alpha=scale, out=tile_grad_q)
        tile_grad_k.baddbmm_(grad_scores.mT, tile_q, alpha=scale)
    return grad_q, grad_k, grad_v


@_causal.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    return torch.empty_like(v)


@_causal_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, starts = inputs
    ctx.save_for_backward(q, k, v, starts)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts = ctx.saved_tensors
    return *_causal_backward(grad_output, q, k, v, ctx.scale, starts), None, None


_causal.register_autograd(_gradients, setup_context=_save_inputs)
