"""Losses of rows of logits, and their gradients in place: one pass for the losses, a second one for the gradients.

Used by ``chunked_cross_entropy``, where plain torch takes five passes and needs a float32 copy of the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from antransformer.kernels import device_of

MAX_BLOCK = 4096  # columns that a program reads at a time


def losses_and_gradients_(logits: Tensor, targets: Tensor, train: bool) -> Tensor:
    """Replace contiguous logits (tokens, V) by the gradients of their summed loss, if ``train``.

    Args:
        logits: logits in any floating dtype; computed in float32 (float64 for float64).
        targets: token ids (tokens,).
        train: whether gradients are needed; otherwise the logits stay as they are.

    Returns:
        Loss of each token (tokens,), in float32 (float64 for float64).
    """
    rows, vocab = logits.shape
    targets = targets.contiguous()  # the kernel takes no stride
    losses = logits.new_empty(rows, dtype=torch.promote_types(logits.dtype, torch.float32))
    if rows:
        block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
        warps = max(1, block // 512)
        with device_of(logits):
            _losses[(rows,)](logits, targets, losses, VOCAB=vocab, TRAIN=train, BLOCK=block, num_warps=warps)
    return losses


@triton.jit
def _losses(logits, targets, losses, VOCAB: tl.constexpr, TRAIN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    target = tl.load(targets + row)
    precision = losses.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    # Largest logit so far, and BLOCK interleaved parts of the sum of exp(logit - largest).
    largest = tl.full((), float("-inf"), precision)
    total = tl.zeros((BLOCK,), precision)
    for start in range(0, VOCAB, BLOCK):
        column = start + columns
        scores = tl.load(logits + column, mask=column < VOCAB, other=float("-inf")).to(precision)
        higher = tl.maximum(largest, tl.max(scores, 0))
        total = total * tl.exp(largest - higher) + tl.exp(scores - higher)
        largest = higher
    log_sum = largest + tl.log(tl.sum(total, 0))
    # A target outside the vocabulary gives NaN: unlike a CPU, a GPU cannot raise an error here.
    exists = (target >= 0) & (target < VOCAB)
    tl.store(losses + row, log_sum - tl.load(logits + target, mask=exists, other=float("nan")).to(precision))
    if TRAIN:
        tl.debug_barrier()  # the logit of the target is read before it is replaced
        for start in range(0, VOCAB, BLOCK):
            column = start + columns
            inside = column < VOCAB
            scores = tl.load(logits + column, mask=inside, other=0.0).to(precision)
            gradient = tl.exp(scores - log_sum) - tl.where(column == target, 1.0, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
