"""Compilation of the model of a run, and training without it where the compiler fails."""

from collections.abc import Callable

import torch
from torch import Tensor

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.cost_model.throughput import flops_per_token
from antransformer.training.device import autocast, is_out_of_memory
from antransformer.training.distributed.parallel import reshard

LAUNCH_FLOPS = 5e11  # of a layer, below which a GPU waits for launches

Loss = Callable[[Tensor, Tensor], Tensor]  # token ids and targets (B, T) -> mean loss


def use_cuda_graphs(config: TrainConfig, device: torch.device, sequences: int) -> bool:
    """Whether the steps of a run are replayed as CUDA graphs: on one GPU, where kernels are shorter than their launch.

    Graphs keep gradients in memory of their own, which the next micro-batch would overwrite.
    """
    tokens = sequences * config.model.context
    is_short = flops_per_token(config.model) * tokens < LAUNCH_FLOPS * config.model.layers
    single = config.batch_size == sequences
    return device.type == "cuda" and single and is_short and not config.document_mask and config.precision != "fp8"


def compiled_loss(
    model: Decoder,
    config: TrainConfig,
    device: torch.device,
    precision: torch.dtype,
    sequences: int,
    log: Callable[[str], None],
) -> Loss:
    """Return the compiled loss of a model, or its own loss, with a message to ``log``, if the compiler fails.

    The compiler runs at the first call, so this computes the loss and the gradients of one micro-batch, and then the
    loss as a validation does. Blocks that are compiled already (``distributed.parallel.make_model``) are not compiled
    again.

    Args:
        model: model on the device.
        config: settings of the run.
        device: its device.
        precision: dtype of the autocast.
        sequences: sequences of a micro-batch of this rank.
        log: called with a message.

    Raises:
        RuntimeError: the device has no memory left.
    """
    # Graphs of earlier runs in this process would count towards the limit of torch, above which nothing is compiled.
    torch.compiler.reset()
    by_block = any(block._compiled_call_impl is not None for block in model.blocks)
    mode = "reduce-overhead" if not by_block and use_cuda_graphs(config, device, sequences) else None
    loss: Loss = model.loss if by_block else torch.compile(model.loss, mode=mode)
    tokens = torch.zeros(sequences, config.model.context, dtype=torch.int64, device=device)
    targets = torch.zeros_like(tokens)  # a graph for one tensor in both places would not be used by the steps
    try:
        with autocast(device, precision):
            value = loss(tokens, targets)
        value.backward()
        with torch.no_grad(), autocast(device, precision):  # without gradients the compiler makes another graph
            loss(tokens, targets)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        log(f"warning: torch.compile failed, so the model is not compiled: {reason}")
        loss = model.loss
        for block in model.blocks:
            block._compiled_call_impl = None
    reshard(model)  # FSDP may still hold gathered weights, whose gradients zero_grad would clear instead
    model.zero_grad()
    return loss
