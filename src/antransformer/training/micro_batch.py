"""Micro-batch size of a run by the memory that is free on its device."""

import bisect
from dataclasses import replace

import torch

from antransformer.errors import ConfigError
from antransformer.training.config import TrainConfig
from antransformer.training.cost_model.memory import FLOAT32_BYTES, Layout, estimate_memory
from antransformer.training.defaults import micro_batch_size, parameter_count
from antransformer.training.device import choose_device, choose_precision
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext, check_divisibility
from antransformer.training.resources import free_memory

USABLE_MEMORY = 0.8  # fraction of the free memory; allocators keep freed blocks (docs/planning.md)


def fit_micro_batch(
    config: TrainConfig, dist_ctx: DistributedContext = SINGLE_PROCESS, sharing: int = 1
) -> TrainConfig:
    """Return a config with the largest micro-batch whose step fits into the free memory of all ranks.

    Without a CUDA GPU the config's own size is the limit: larger ones are hardly faster on a CPU, and free memory of
    other devices is not known.

    Args:
        config: settings.
        dist_ctx: all ranks.
        sharing: number of processes on the GPU of a rank.

    Raises:
        ConfigError: a step with one sequence does not fit, or the ranks or the device do not suit the config.
    """
    size = fitting_micro_batch(config, dist_ctx, sharing)
    if size:
        return replace(config, micro_batch_size=size)
    raise ConfigError(
        f"a step of {parameter_count(config.model) / 1e6:,.0f}M parameters with one sequence of "
        f"{config.model.context:,} tokens does not fit into the free memory: choose a smaller preset or context, set "
        "activation_checkpointing, or try it with micro_batch_size 1 (--micro-batch-size 1)"
    )


def fit_default_micro_batch(config: TrainConfig, sharing: int = 1) -> TrainConfig:
    """Return ``fit_micro_batch`` of a config for a GPU with the default micro-batch; other configs are returned as is.

    Args:
        config: settings; their device is a torch device, not ``auto``.
        sharing: number of processes on the GPU.

    Raises:
        ConfigError: as in ``fit_micro_batch``.
    """
    chosen = config.micro_batch_size != micro_batch_size(config.model, config.batch_size)
    on_gpu = config.device.partition(":")[0] == "cuda"
    return config if chosen or not on_gpu else fit_micro_batch(config, sharing=sharing)


def fitting_micro_batch(config: TrainConfig, dist_ctx: DistributedContext = SINGLE_PROCESS, sharing: int = 1) -> int:
    """Micro-batch size for ``fit_micro_batch``; 0 if a step with one sequence does not fit on a rank."""
    dist_ctx = replace(dist_ctx, tensor_parallel=config.tensor_parallel)
    check_divisibility(config, dist_ctx)
    device = choose_device(config.device, dist_ctx.local_rank, dist_ctx.local_world_size)
    # Processes on one CPU share its memory.
    sharing = dist_ctx.local_world_size if device.type == "cpu" else sharing
    usable = USABLE_MEMORY * free_memory(device) / sharing
    share = config.batch_size // dist_ctx.data_parallel_size

    def needed(size: int) -> float:
        return step_memory(replace(config, micro_batch_size=size), device, dist_ctx)

    size = share if device.type == "cuda" else min(config.micro_batch_size, share)
    if needed(size) > usable:  # in parts a step may need more memory than whole, for the sum of the gradients
        size = bisect.bisect_right(range(1, size), usable, key=needed)
    if size:
        size = -(-share // -(-share // size))  # parts of about equal size
    smallest = -dist_ctx.all_reduce_max(-size)
    # A rank never takes more than its share. The size of the config may be larger, for a run that continues on fewer.
    return max(config.micro_batch_size, share) if smallest == share else smallest


def step_memory(config: TrainConfig, device: torch.device, dist_ctx: DistributedContext = SINGLE_PROCESS) -> float:
    """Expected bytes on the device of one rank at the peak of a training step."""
    share = config.batch_size // dist_ctx.data_parallel_size
    size = min(config.micro_batch_size, share)
    layout = Layout(
        strategy=config.parallel,
        devices=dist_ctx.world_size,
        gpus_per_node=dist_ctx.local_world_size,
        tensor_parallel=config.tensor_parallel,
        checkpointing=config.activation_checkpointing,
        micro_batch_size=size,
        grad_accum_steps=-(-share // size),
    )
    copies = 1 / (layout.shards * config.tensor_parallel) if config.ema else 0.0
    average = FLOAT32_BYTES * parameter_count(config.model) * copies
    return estimate_memory(config.model, layout, choose_precision(config.precision, device)).total + average
