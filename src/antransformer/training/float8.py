"""Linear maps of the blocks multiplied in 8 bits, applied to a model from outside; embedding and head stay as they are.

Activations and weights are rounded to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57,344),
each divided by a size first, so that its coordinates are of order 1. Sums are of float32. For a bounded linear map
sizes are constants that follow from the norms which its factor is about: no statistic is taken. For torch's own
``nn.Linear``, in the baselines, whose norms nothing holds, a size is taken from the largest magnitude in the tensor.

Products are torch's scaled ones on a GPU that has them. Elsewhere the format is simulated: numbers are rounded as there
and multiplied in the dtype of the result.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from antransformer import nn as bounded
from antransformer.errors import ConfigError
from antransformer.models import Decoder, ModelConfig

BLOCK = 16  # the scaled product takes matrices whose sides are multiples of it
CAPABILITY = (8, 9)  # of the first GPUs that multiply in 8 bits
GROWTH = 4  # room for what training adds to norms: a factor of up to 8 was seen in front of down projections


def check(config: ModelConfig, device: torch.device) -> None:
    """Refuse what can not be multiplied in 8 bits.

    Raises:
        ConfigError: the device can not, or the sizes of the model are none that it takes.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ConfigError(f"precision fp8 needs a GPU of compute capability 8.9 or above, not {device}: use bfloat16")
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"precision fp8 is for NVIDIA GPUs, and simulated on a CPU, not for {device}: use bfloat16")
    for name in ("head_dim", "context"):
        if getattr(config, name) % BLOCK:
            raise ConfigError(f"precision fp8 needs a {name} that {BLOCK} divides, got {getattr(config, name)}")


def convert(model: Decoder, device: torch.device) -> None:
    """Have the linear maps of all blocks compute in 8 bits; parameters, their names and their values stay.

    Args:
        model: on whatever device it is now.
        device: where it is to compute.

    Raises:
        ConfigError: see ``check``.
    """
    check(model.config, device)
    for block in model.blocks:
        for name, module in block.named_modules():
            if isinstance(module, bounded.Linear):
                # Of unit norm is what they read; of attention each head is, of the width of a head.
                fan_in = model.config.head_dim if name.endswith("out_proj") else module.weight.shape[1]
                module.__class__ = StaticLinear
                assert isinstance(module, StaticLinear)
                module.sizes = unit_scales(fan_in, *module.weight.shape)
            elif isinstance(module, nn.Linear):
                module.__class__ = DynamicLinear


def unit_scales(input_width: int, fan_out: int, fan_in: int) -> tuple[float, float, float]:
    """Sizes of inputs, weights and gradients of a bounded map, powers of two.

    A coordinate of a vector of unit norm has the standard deviation 1 / sqrt(width). The gradient is one token's share
    of a mean loss of order 1, times the number of tokens; it keeps its norm on the way down, as the stream does on the
    way up.
    """
    return GROWTH * power_of_two(input_width), power_of_two(fan_in), power_of_two(fan_out)


def power_of_two(width: int) -> float:
    """The nearest to 1 / sqrt(width): dividing by it rounds nothing."""
    return 2.0 ** -round(math.log2(width) / 2)


class StaticLinear(bounded.Linear):
    """A bounded linear map in 8 bits with constant sizes; its factor is multiplied into the product's."""

    sizes: tuple[float, float, float]

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(..., fan_in) to (..., fan_out)."""
        weight = self.weight if scale is None else self.weight * scale.to(self.weight.dtype).unsqueeze(1)
        x_size, weight_size, gradient_size = self.sizes
        tokens = x.shape[:-1].numel()
        y: Tensor = Product.apply(x, weight, self.factor, x_size, weight_size, gradient_size / tokens)
        return y if self.bias is None else y + self.bias


class DynamicLinear(nn.Linear):
    """torch's linear map in 8 bits, each tensor of a size of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., fan_in) to (..., fan_out)."""
        y: Tensor = Product.apply(input, self.weight, 1.0, None, None, None)
        return y if self.bias is None else y + self.bias


class Product(torch.autograd.Function):
    """factor * (weight x) of x (..., fan_in) and weight (fan_out, fan_in), both ways in 8 bits.

    Sizes are numbers, or None where they are to be found in the tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        factor: float,
        x_size: float | None,
        weight_size: float | None,
        gradient_size: float | None,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x8, of_x = compress(x.flatten(0, -2), torch.float8_e4m3fn, x_size)
        weight8, of_weight = compress(weight, torch.float8_e4m3fn, weight_size)
        ctx.save_for_backward(x8, weight8, *(size for size in (of_x, of_weight) if isinstance(size, Tensor)))
        ctx.factor, ctx.sizes, ctx.gradient_size = factor, (x_size, weight_size), gradient_size
        return multiply(x8, weight8.T, factor * of_x * of_weight, dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x8, weight8, *found = ctx.saved_tensors
        of_x, of_weight = found or ctx.sizes
        gradient8, size = compress(gradient.flatten(0, -2), torch.float8_e5m2, ctx.gradient_size)
        for_x = multiply(gradient8, weight8, ctx.factor * size * of_weight, gradient.dtype)
        for_weight = multiply(gradient8.T, x8, ctx.factor * size * of_x, gradient.dtype)
        return for_x.unflatten(0, gradient.shape[:-1]), for_weight, None, None, None, None


def compress(x: Tensor, dtype: torch.dtype, size: float | None) -> tuple[Tensor, float | Tensor]:
    """x / size rounded to 8 bits, and the size; None takes one at which the largest magnitude is the dtype's."""
    limit = torch.finfo(dtype).max
    if size is None:
        amax = x.abs().amax().float()
        scale = torch.where(amax > 0, amax / limit, 1.0)
        return (x / scale).clamp(-limit, limit).to(dtype), scale
    # Past the limit lies NaN in one format and infinity in the other.
    return (x * (1 / size)).clamp(-limit, limit).to(dtype), size


def multiply(a: Tensor, b: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """scale * (a b) of two matrices in 8 bits."""
    return scaled_product(a, b, scale, dtype) if a.is_cuda else (a.to(dtype) @ b.to(dtype)) * scale


def scaled_product(a: Tensor, b: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``multiply`` by torch's own product of 8 bits, which on a CPU is there too, but slow."""
    one = torch.ones((), device=a.device)
    # It wants the rows of the first together in memory, and the columns of the second.
    return torch._scaled_mm(a.contiguous(), b.T.contiguous().T, one * scale, one, out_dtype=dtype)
