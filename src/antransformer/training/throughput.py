"""What a step costs, and what the device could do: floating-point operations and their share used (MFU)."""

import torch

from antransformer.models import ModelConfig

# Dense bfloat16 peak in FLOP/s from the makers' data sheets, by a part of the device's name; the first match counts.
PEAK_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token: 6 a weight in a matrix product, plus causal attention.

    The embedding look-up costs none; attention counts half of the full score matrix, forward and backward. A
    multiplication and an addition are two operations.
    """
    block = 4 * config.width**2 + 3 * config.width * config.mlp_width
    weights = config.layers * block + config.vocab_size * config.width
    attention = config.layers * config.width * config.context
    return 6.0 * (weights + attention)


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Peak FLOP/s of the device in this precision, or None where it is not known (float32, a CPU, an unlisted GPU)."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BFLOAT16.items() if key in name), None)
