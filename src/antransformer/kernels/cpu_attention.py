"""Causal attention in bfloat16 on a CPU, as matrix products over blocks of queries.

torch's fused kernel (2.13) does not use the bfloat16 instructions of the processor, which these products use. The
probabilities of a block are computed again for backward, so memory is linear in the number of tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

ROWS = 128  # queries in a block


def is_supported(q: Tensor, k: Tensor) -> bool:
    """Whether ``causal`` takes queries and keys (B, T, n, h): bfloat16 on a CPU, with a key for each query.

    Fake tensors are not taken, since estimates of memory make them on a CPU and mean a GPU.
    """
    fits = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape == k.shape
    return fits and not isinstance(q, FakeTensor)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention softmax(scale * q k^T) v, causal, of q, k and v (B, T, n, h) in bfloat16; same shape and dtype."""
    batch, _, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return _causal(q, k, v, scale).unflatten(0, (batch, heads)).transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, scale: float, start: int) -> Tensor:
    """Attention probabilities (B * n, rows, keys) of the block of queries from ``start`` on."""
    end = min(start + ROWS, q.shape[1])
    mask = torch.full((end - start, end), -torch.inf, dtype=q.dtype).triu_(start + 1)
    return torch.baddbmm(mask, q[:, start:end], k[:, :end].mT, alpha=scale).softmax(-1)


# Custom operators, since torch.compile would unroll the loops over blocks.
@torch.library.custom_op("antransformer::cpu_attention", mutates_args=(), device_types="cpu")
def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    y = torch.empty_like(v)
    for start in range(0, q.shape[1], ROWS):
        probabilities = _probabilities(q, k, scale, start)
        rows, end = probabilities.shape[1:]
        torch.bmm(probabilities, v[:, :end], out=y[:, start : start + rows])
    return y


@torch.library.custom_op("antransformer::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _causal_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[1], ROWS):
        probabilities = _probabilities(q, k, scale, start)
        rows, end = probabilities.shape[1:]
        block = slice(start, start + rows)
        grad_v[:, :end].baddbmm_(probabilities.mT, grad[:, block])
        grad_scores = torch._softmax_backward_data(grad[:, block] @ v[:, :end].mT, probabilities, -1, q.dtype)
        torch.baddbmm(q.new_zeros(1), grad_scores, k[:, :end], beta=0, alpha=scale, out=grad_q[:, block])
        grad_k[:, :end].baddbmm_(grad_scores.mT, q[:, block], alpha=scale)
    return grad_q, grad_k, grad_v


@_causal.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(v)


@_causal_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *_causal_backward(grad_output, *ctx.saved_tensors, ctx.scale), None


_causal.register_autograd(_gradients, setup_context=_save_inputs)
