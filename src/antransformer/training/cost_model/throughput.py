"""What a step costs in operations and bytes, what devices could do, and what share of that is expected (MFU)."""

from dataclasses import dataclass

import torch

from antransformer.models import ModelConfig
from antransformer.training.cost_model.memory import WEIGHT, Layout, block_parameters


@dataclass(frozen=True)
class Gpu:
    """A device as its maker's data sheet has it.

    Attributes:
        part: of the name by which torch knows it.
        peak: dense bfloat16 FLOP/s.
        memory: bytes.
        bandwidth: bytes/s of its memory.
        link: bytes/s, each way, to the others in its machine: NVLink, or PCIe where there is none.
    """

    part: str
    peak: float
    memory: float
    bandwidth: float
    link: float


# The first whose part is in the device's name counts.
GPUS = {
    "b200": Gpu("B200", 2250e12, 180e9, 8.0e12, 900e9),
    "h200": Gpu("H200", 989e12, 141e9, 4.8e12, 450e9),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 80e9, 2.0e12, 64e9),
    "h100": Gpu("H100", 989e12, 80e9, 3.35e12, 450e9),
    "a100-40gb": Gpu("A100", 312e12, 40e9, 1.555e12, 300e9),
    "a100-80gb": Gpu("A100", 312e12, 80e9, 2.039e12, 300e9),
    "l40s": Gpu("L40S", 362e12, 48e9, 0.864e12, 32e9),
    "l4": Gpu("L4", 121e12, 24e9, 0.3e12, 32e9),
    "a10": Gpu("A10", 125e12, 24e9, 0.6e12, 32e9),
    "rtx4090": Gpu("RTX 4090", 165e12, 24e9, 1.008e12, 32e9),
}

ASSUMED_MFU = 0.4  # assumed MFU of a device that waits for no other, with nothing computed twice
LINK_EFFICIENCY = 0.8  # assumed share of a link's figure that collective operations reach
OPTIMIZER_TRAFFIC = 40  # bytes a parameter: Adam reads 16 and writes 12, the gradient's norm and the bounds take 12


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token: 6 a weight in a matrix product, plus causal attention.

    The embedding look-up costs none; attention counts half of the full score matrix, forward and backward. A
    multiplication and an addition are two operations.
    """
    block = 4 * config.width**2 + 3 * config.width * config.mlp_hidden
    weights = config.layers * block + config.vocab_size * config.width
    attention = config.layers * config.width * config.context
    return 6.0 * (weights + attention)


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Peak FLOP/s of the device in this precision, or None where it is not known (float32, a CPU, an unlisted GPU)."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak for gpu in GPUS.values() if gpu.part in name), None)


@dataclass(frozen=True)
class CommVolume:
    """Bytes that a device sends in a step.

    Attributes:
        shards: parameters gathered and gradients scattered among those that share parameters.
        replicas: gradients summed over those that have the same part.
        tensor: activations summed over tensor-parallel devices.
    """

    shards: float
    replicas: float
    tensor: float


def comm_volume(config: ModelConfig, layout: Layout) -> CommVolume:
    """What collective operations send, in rings: (n - 1) / n of the whole for a gather, twice that for a sum.

    Parameters are gathered in bfloat16 in the forward and the backward pass, gradients summed in float32 in the last
    pass of a step; a tensor-parallel block sums its two outputs forward and two gradients backward, in bfloat16, and
    the outputs again where it is computed again.
    """
    block, root = block_parameters(config)
    part = (config.layers * block + root) / layout.tensor
    half = torch.bfloat16.itemsize
    replicas = layout.copies // layout.shards
    sums = (6 if layout.checkpointing else 4) * config.layers * layout.passes
    numbers = layout.micro_batch_size * config.context * config.width
    return CommVolume(
        shards=(2 * half * layout.passes + WEIGHT) * part * _others(layout.shards),
        replicas=2 * WEIGHT * part / layout.shards * _others(replicas),
        tensor=2 * sums * half * numbers * _others(layout.tensor),
    )


def step_seconds(config: ModelConfig, layout: Layout, gpu: Gpu, network: float) -> float:
    """Expected time of a step: products or the traffic that hides behind them, whichever is longer, and what does not.

    Args:
        config: sizes.
        layout: how devices share it.
        gpu: each of them.
        network: bytes/s of each device to other machines.
    """
    tokens = layout.copies * layout.passes * layout.micro_batch_size * config.context
    again = 4 / 3 if layout.checkpointing else 1.0
    products = again * tokens * flops_per_token(config) / (layout.devices * gpu.peak * ASSUMED_MFU)
    sent = comm_volume(config, layout)
    one_machine = layout.devices <= layout.node
    near, far = LINK_EFFICIENCY * gpu.link, LINK_EFFICIENCY * (gpu.link if one_machine else network)
    hidden = sent.shards / (far if layout.way == "fsdp" else near) + sent.replicas / far
    block, root = block_parameters(config)
    own = (config.layers * block + root) / (layout.tensor * layout.shards)
    return max(products, hidden) + sent.tensor / near + OPTIMIZER_TRAFFIC * own / gpu.bandwidth


def expected_mfu(config: ModelConfig, layout: Layout, gpu: Gpu, network: float) -> float:
    """Operations of the model over what the devices could do in the time of a step."""
    tokens = layout.copies * layout.passes * layout.micro_batch_size * config.context
    could = layout.devices * gpu.peak * step_seconds(config, layout, gpu, network)
    return tokens * flops_per_token(config) / could


def _others(devices: int) -> float:
    return (devices - 1) / devices
