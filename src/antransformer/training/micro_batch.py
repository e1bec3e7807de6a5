"""Micro-batch size of a run by the memory that is free on its device."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from antransformer.errors import ConfigError
from antransformer.training.config import TrainConfig
from antransformer.training.cost_model.memory import FLOAT32_BYTES, Layout, estimate_memory
from antransformer.training.defaults import parameter_count
from antransformer.training.device import choose_device, choose_precision
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext, check_divisibility

USABLE_MEMORY = 0.8  # fraction of the free memory; allocators keep freed blocks (docs/planning.md)


def fit_micro_batch(config: TrainConfig, dist_ctx: DistributedContext = SINGLE_PROCESS) -> TrainConfig:
    """Return a config with the largest micro-batch whose step fits into the free memory of all ranks.

    On a CPU the config's own size is the limit, since larger ones are hardly faster there.

    Raises:
        ConfigError: a step with one sequence does not fit, or the ranks or the device do not suit the config.
    """
    size = fitting_micro_batch(config, dist_ctx)
    if size:
        return replace(config, micro_batch_size=size)
    raise ConfigError(
        f"a step of {parameter_count(config.model) / 1e6:,.0f}M parameters with one sequence of "
        f"{config.model.context:,} tokens does not fit into the free memory: choose a smaller preset or context, set "
        "activation_checkpointing, or try it with micro_batch_size 1 (--micro-batch-size 1)"
    )


def fitting_micro_batch(config: TrainConfig, dist_ctx: DistributedContext = SINGLE_PROCESS) -> int:
    """Micro-batch size for ``fit_micro_batch``; 0 if a step with one sequence does not fit on a rank."""
    dist_ctx = replace(dist_ctx, tensor_parallel=config.tensor_parallel)
    check_divisibility(config, dist_ctx)
    device = choose_device(config.device, dist_ctx.local_rank, dist_ctx.local_world_size)
    # Processes on one CPU share its memory.
    usable = USABLE_MEMORY * free_memory(device) / (dist_ctx.local_world_size if device.type == "cpu" else 1)
    share = config.batch_size // dist_ctx.data_parallel_size
    largest = min(config.micro_batch_size, share) if device.type == "cpu" else share
    size = largest
    while size and step_memory(replace(config, micro_batch_size=size), device, dist_ctx) > usable:
        size = -(-size // 2) if size > 1 else 0
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


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free on a device; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
