"""Model of the time of a training step: operations, bytes sent between devices, and expected MFU.

MFU (model FLOPs utilization) is the fraction of the devices' peak FLOP/s that a run uses for the model's operations.
"""

import re
from dataclasses import dataclass

import torch

from antransformer.models import ModelConfig
from antransformer.training.cost_model.memory import FLOAT32_BYTES, Layout, block_parameters


@dataclass(frozen=True)
class Gpu:
    """GPU with the figures of its data sheet.

    Attributes:
        name: words in the name that torch reports.
        peak_flops: dense bfloat16 FLOP/s.
        memory: bytes of memory.
        memory_bandwidth: bytes/s of its memory.
        link_bandwidth: bytes/s in each direction to other GPUs of the node, by NVLink or else PCIe.
    """

    name: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# Ordered: the first entry whose words are in the device's name applies.
GPUS = {
    "b200": Gpu("B200", 2250e12, 180e9, 8.0e12, 900e9),
    "gh200": Gpu("GH200", 989e12, 96e9, 4.0e12, 450e9),
    "h200-nvl": Gpu("H200 NVL", 835e12, 141e9, 4.8e12, 450e9),
    "h200": Gpu("H200", 989e12, 141e9, 4.8e12, 450e9),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 80e9, 2.0e12, 64e9),
    "h100-nvl": Gpu("H100 NVL", 835e12, 94e9, 3.9e12, 300e9),
    "h100": Gpu("H100", 989e12, 80e9, 3.35e12, 450e9),
    "h800": Gpu("H800", 989e12, 80e9, 3.35e12, 200e9),
    "h20": Gpu("H20", 148e12, 96e9, 4.0e12, 450e9),
    "a100-40gb": Gpu("A100", 312e12, 40e9, 1.555e12, 300e9),
    "a100-80gb": Gpu("A100", 312e12, 80e9, 2.039e12, 300e9),
    "l40s": Gpu("L40S", 362e12, 48e9, 0.864e12, 32e9),
    "l40": Gpu("L40", 181e12, 48e9, 0.864e12, 32e9),
    "l4": Gpu("L4", 121e12, 24e9, 0.3e12, 32e9),
    "a10g": Gpu("A10G", 70e12, 24e9, 0.6e12, 32e9),
    "a10": Gpu("A10", 125e12, 24e9, 0.6e12, 32e9),
    "rtx6000-ada": Gpu("RTX 6000 Ada", 364e12, 48e9, 0.96e12, 32e9),
    "rtx-a6000": Gpu("RTX A6000", 155e12, 48e9, 0.768e12, 32e9),
    "rtx5090": Gpu("RTX 5090", 210e12, 32e9, 1.792e12, 64e9),
    "rtx4090": Gpu("RTX 4090", 165e12, 24e9, 1.008e12, 32e9),
    "rtx3090": Gpu("RTX 3090", 71e12, 24e9, 0.936e12, 32e9),
}

ASSUMED_MFU = 0.4  # of a device that waits for no other and recomputes nothing
LINK_EFFICIENCY = 0.8  # assumed fraction of a link's nominal bandwidth that collectives reach
OPTIMIZER_TRAFFIC = 40  # bytes per parameter: Adam reads 16 and writes 12; gradient norm and bounds take 12


def flops_per_token(config: ModelConfig) -> float:
    """Return the floating-point operations to train on one token: 6 per matrix weight, plus causal attention.

    A multiplication and an addition are two operations. The embedding costs none. Attention counts half of the score
    matrix, forward and backward.
    """
    block = 4 * config.width**2 + 3 * config.width * config.mlp_hidden
    weights = config.layers * block + config.vocab_size * config.width
    attention = config.layers * config.width * config.context
    return 6.0 * (weights + attention)


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Peak FLOP/s of a GPU in bfloat16; None for a CPU, an unlisted GPU, a part of a GPU (MIG) or another precision."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:  # a part of the GPU that is named before
        return None
    # Whole words: an A10G is not an A10.
    return next((gpu.peak_flops for gpu in GPUS.values() if re.search(rf"\b{gpu.name}\b", name)), None)


@dataclass(frozen=True)
class CommVolume:
    """Bytes that one device sends in a step, by mesh axis.

    Attributes:
        shard: all-gathers of parameters and reduce-scatters of gradients.
        replicate: all-reduces of gradients.
        tensor: all-reduces of activations between tensor-parallel devices.
    """

    shard: float
    replicate: float
    tensor: float


def comm_volume(config: ModelConfig, layout: Layout) -> CommVolume:
    """Return the bytes that ring collectives send in a step.

    Among n devices an all-gather or a reduce-scatter sends (n - 1) / n of the tensor, an all-reduce twice that.
    Parameters are gathered in bfloat16 in every forward and backward pass. Gradients are reduced in float32 in the last
    backward pass of a step.
    """
    block, root = block_parameters(config)
    parameters = (config.layers * block + root) / layout.tensor_parallel
    half = torch.bfloat16.itemsize
    replicas = layout.data_parallel_size // layout.shards
    # Per block and pass: the outputs of both sublayers forward, the gradients of their inputs backward, and the outputs
    # again if they are recomputed.
    all_reduces = (6 if layout.checkpointing else 4) * config.layers * layout.grad_accum_steps
    activations = layout.micro_batch_size * config.context * config.width
    return CommVolume(
        shard=(2 * half * layout.grad_accum_steps + FLOAT32_BYTES) * parameters * _ring_fraction(layout.shards),
        replicate=2 * FLOAT32_BYTES * parameters / layout.shards * _ring_fraction(replicas),
        tensor=2 * all_reduces * half * activations * _ring_fraction(layout.tensor_parallel),
    )


def step_seconds(config: ModelConfig, layout: Layout, gpu: Gpu, network: float) -> float:
    """Return the expected time of a step in seconds.

    Communication of the data-parallel axes overlaps with the matrix products, so the longer of both counts. That of
    tensor parallelism and the optimizer step do not overlap, and are added.

    Args:
        config: model.
        layout: layout of the run.
        gpu: type of all devices.
        network: bytes/s from each device to other nodes.
    """
    recomputation = 4 / 3 if layout.checkpointing else 1.0  # a second forward pass, a third of all operations
    tokens = layout.batch_size * config.context
    products = recomputation * tokens * flops_per_token(config) / (layout.devices * gpu.peak_flops * ASSUMED_MFU)
    volume = comm_volume(config, layout)
    single_node = layout.devices <= layout.gpus_per_node
    within_node = LINK_EFFICIENCY * gpu.link_bandwidth
    across_nodes = LINK_EFFICIENCY * (gpu.link_bandwidth if single_node else network)
    shard_bandwidth = across_nodes if layout.strategy == "fsdp" else within_node  # hsdp shards within a node
    overlapped = volume.shard / shard_bandwidth + volume.replicate / across_nodes
    block, root = block_parameters(config)
    local_parameters = (config.layers * block + root) / (layout.tensor_parallel * layout.shards)
    optimizer = OPTIMIZER_TRAFFIC * local_parameters / gpu.memory_bandwidth
    return max(products, overlapped) + volume.tensor / within_node + optimizer


def expected_mfu(config: ModelConfig, layout: Layout, gpu: Gpu, network: float) -> float:
    """Return the model's operations divided by what the devices could compute in the time of a step."""
    capacity = layout.devices * gpu.peak_flops * step_seconds(config, layout, gpu, network)
    return layout.batch_size * config.context * flops_per_token(config) / capacity


def _ring_fraction(devices: int) -> float:
    return (devices - 1) / devices
