"""Weights of a checkpoint in the layout of an architecture that serving engines know, in float64.

``exaone4`` and ``qwen3`` derive the weights. The writers of folders and of GGUF files only round and store them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from antransformer.errors import CheckpointError
from antransformer.models.config import ModelConfig

# Frequencies of the coordinates without rotary embedding are divided by this, so their angles are 0 in float32.
ROPE_FACTOR = 2.0**60
LARGEST_FLOAT32 = float(torch.finfo(torch.float32).max)
LARGEST_FLOAT16 = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class RopeScaling:
    """Parameters of the rope type ``llama3``, which leaves short wavelengths and divides the frequency of long ones."""

    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of whole heads that equals one of their leading coordinates only.

    Attributes:
        theta: base of the wavelengths.
        scaling: None if all coordinates are rotated.
        divisors: divisor of each of the head_dim / 2 frequencies, the same scaling as a tensor; None without one.
    """

    theta: float
    scaling: RopeScaling | None
    divisors: Tensor | None


@dataclass(frozen=True)
class StockModel:
    """A model in the layout of a standard architecture.

    Attributes:
        layout: ``model_type`` of transformers, which is also the name of the architecture in GGUF.
        config: sizes.
        weights: float64 tensors by their name in transformers.
        eps: epsilon of all RMS norms.
        rope: rotary embedding.
        peak: largest magnitude that an activation is expected to have.
    """

    layout: str
    config: ModelConfig
    weights: dict[str, Tensor]
    eps: float
    rope: Rope
    peak: float

    def fits_float16(self) -> bool:
        """Whether no weight, and no activation with a margin of two, overflows in float16."""
        largest = max(float(weight.abs().max()) for weight in self.weights.values())
        return max(largest, 2 * self.peak) < LARGEST_FLOAT16


def rope_of(config: ModelConfig, where: str) -> Rope:
    """Return the rotary embedding for heads in the order of ``split_qkv``.

    Raises:
        CheckpointError: no parameters give the frequencies of this model. ``where`` names the checkpoint.
    """
    half, rotated, base = config.head_dim // 2, config.rotary_dim // 2, config.rope_theta
    if config.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {config.head_dim} is odd: use --format native")
    if rotated == half:
        return Rope(base, None, None)
    divisors = torch.full((half,), ROPE_FACTOR)
    divisors[:rotated] = 1.0
    # All wavelengths are at least 2 pi, so without rotated coordinates 3 is below all of them.
    theta, boundary, margin = base, 3.0, 2.0**0.5
    if rotated:
        theta = float(base) ** (half / rotated) if math.log(base) * half / rotated < 700 else math.inf
        boundary = 2 * math.pi * base ** ((2 * rotated - 1) / (2 * rotated))
        margin = base ** (1 / (4 * rotated))
    if base <= 1.01 or theta > LARGEST_FLOAT32:
        raise CheckpointError(
            f"{where}: rope_theta {base:g} with rotary_fraction {config.rotary_fraction:g} has no equivalent for whole "
            "heads: use --format native"
        )
    context = max(1, config.context // 2)
    return Rope(theta, RopeScaling(context / (boundary * margin), context * margin / boundary, context), divisors)


def split_qkv(weight: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection (3 d, d) into q, k and v (heads, h, d), with q and k ordered for ``Rope``.

    Engines pair coordinate i with i + h / 2, and this package i with i + rotary_dim / 2. The coordinates without rotary
    embedding are therefore divided between the two halves of the head.
    """
    q, k, v = weight.unflatten(0, (config.heads, 3, config.head_dim)).unbind(1)
    half, rotated = config.head_dim // 2, config.rotary_dim // 2
    rest = torch.arange(2 * rotated, config.head_dim)
    first, second = torch.arange(rotated), torch.arange(rotated, 2 * rotated)
    order = torch.cat([first, rest[: half - rotated], second, rest[half - rotated :]])
    return q[:, order], k[:, order], v


def power_of_two(target: float, value: Tensor) -> Tensor:
    """Return the powers of two that bring positive values closest to the target; 1 for a value of 0."""
    exponents = (math.log2(target) - value.double().log2()).round()
    return torch.where(value > 0, torch.exp2(exponents), 1.0)


def head_scores(score_scale: float, head_dim: int) -> tuple[float, float]:
    """Return the gains of q and k that give normalized q and k the scale of their scores.

    Engines divide scores by sqrt(h), and their norms give q and k the length sqrt(h).
    """
    size = math.sqrt(abs(score_scale) / math.sqrt(head_dim))
    return math.copysign(size, score_scale), size
