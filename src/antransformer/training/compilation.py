"""Compilation of the model of a run, and training without it where the compiler fails."""

from collections.abc import Callable

import torch
from torch import Tensor

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.device import autocast, is_out_of_memory

Loss = Callable[[Tensor, Tensor], Tensor]  # token ids and targets (B, T) -> mean loss


def compiled_loss(
    model: Decoder, config: TrainConfig, device: torch.device, precision: torch.dtype, log: Callable[[str], None]
) -> Loss:
    """Return the compiled loss of a model, or its own loss, with a message to ``log``, if the compiler fails.

    The compiler runs at the first call, so this computes the loss and the gradients of one micro-batch. Blocks that
    are compiled already (``distributed.parallel.make_model``) are not compiled again.

    Raises:
        RuntimeError: the device has no memory left.
    """
    by_block = any(block._compiled_call_impl is not None for block in model.blocks)
    loss: Loss = model.loss if by_block else torch.compile(model.loss)
    tokens = torch.zeros(config.micro_batch_size, config.model.context, dtype=torch.int64, device=device)
    try:
        with autocast(device, precision):
            value = loss(tokens, tokens)
        value.backward()
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        log(f"warning: torch.compile failed, so the model is not compiled: {reason}")
        loss = model.loss
        for block in model.blocks:
            block._compiled_call_impl = None
    model.zero_grad()
    return loss
