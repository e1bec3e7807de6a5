"""Cross-entropy whose logits are computed for some tokens at a time, together with their gradients."""

from typing import Any

import torch
from torch import Tensor

from antransformer import kernels

# Tokens in a chunk. On CPUs small chunks stay in cache, and large ones add to the gradient of the weight less often
# (docs/log.md); accelerators need larger products to be busy.
CHUNK = {"cpu": 256}
LARGE_CHUNK = 4096


# A custom operator, since torch.compile would unroll the loop over chunks.
@torch.library.custom_op("antransformer::cross_entropy", mutates_args=())
def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and the gradients of the summed loss with respect to hidden (tokens, d) and weight (V, d).

    Without ``train`` both gradients are empty placeholders, since an operator has a fixed number of outputs.
    """
    precision = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=precision, device=hidden.device)
    grad_hidden = torch.empty_like(hidden if train else hidden[:0])
    grad_weight = torch.zeros_like(weight if train else weight[:0], dtype=precision)
    rows = CHUNK.get(hidden.device.type, LARGE_CHUNK)
    for start in range(0, len(hidden), rows):
        chunk, target = hidden[start : start + rows], targets[start : start + rows]
        losses, grad_logits = _chunk(chunk @ weight.T, target, train)
        total += losses.sum()
        if train:
            torch.mm(grad_logits, weight, out=grad_hidden[start : start + rows])
            if precision == weight.dtype:
                grad_weight.addmm_(grad_logits.T, chunk)
            elif hidden.is_cuda:
                torch.addmm(grad_weight, grad_logits.T, chunk, out_dtype=precision, out=grad_weight)
            else:  # products of half precision are summed over chunks in float32
                grad_weight.add_(grad_logits.T @ chunk)
    return total / len(hidden), grad_hidden, grad_weight


def _chunk(logits: Tensor, targets: Tensor, train: bool) -> tuple[Tensor, Tensor]:
    """Losses of the tokens in float32 or float64, and, if ``train``, the gradients (tokens, V) of their sum."""
    if kernels.use_triton(logits):
        from antransformer.kernels.cross_entropy import losses_and_gradients_

        return losses_and_gradients_(logits, targets, train), logits
    scores = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    targets = targets.unsqueeze(1)
    losses = -scores.gather(1, targets)
    if train:
        # The gradient of the logits is softmax minus one-hot, made in place of the log-probabilities.
        scores.exp_()
        scores.scatter_add_(1, targets, scores.new_full(targets.shape, -1.0))
        scores = scores.to(logits.dtype)
    return losses, scores


@loss_and_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    precision = torch.promote_types(hidden.dtype, torch.float32)
    grad_weight = torch.empty_like(weight if train else weight[:0], dtype=precision)
    return hidden.new_empty((), dtype=precision), torch.empty_like(hidden if train else hidden[:0]), grad_weight


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("cross_entropy has no second derivative: do not set create_graph")
    grad_hidden, grad_weight = ctx.saved_tensors
    scale = grad_output / len(grad_hidden)  # forward saved the gradients of the sum
    return (grad_hidden * scale).to(grad_hidden.dtype), (grad_weight * scale).to(ctx.dtype), None, None


loss_and_gradients.register_autograd(_scale_gradients, setup_context=_save_gradients)
