"""FP8 linear layers for the blocks of a model, applied from outside. Embedding and head keep their precision.

Activations and weights are rounded to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57,344).
Each tensor is divided by a scale first, so that its elements have order 1; sums are in float32. For a bounded linear
layer the scales are constants, since its factor assumes known norms. For torch's ``nn.Linear`` in the baselines, whose
norms are not bounded, the scale is computed from the largest magnitude in the tensor (amax).

GPUs with FP8 use torch's scaled matrix product. Other devices simulate the format: elements are rounded to FP8 and
multiplied in the dtype of the result.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from antransformer import nn as bounded
from antransformer.errors import ConfigError
from antransformer.models import Decoder, ModelConfig

BLOCK = 16  # the scaled product needs matrix sides that are multiples of it
CAPABILITY = (8, 9)  # of the first GPUs with FP8
HEADROOM = 4  # norms grow in training: by a factor of up to 8 in front of down projections


def is_missing(device: torch.device) -> bool:
    """Whether a device is a GPU without FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY


def check(config: ModelConfig, device: torch.device) -> None:
    """Check that a model can use FP8 on a device.

    Raises:
        ConfigError: the device has no FP8, or a size of the model does not fit.
    """
    if is_missing(device):
        raise ConfigError(f"precision fp8 needs a GPU of compute capability 8.9 or above, not {device}: use bfloat16")
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"precision fp8 needs an NVIDIA GPU, or a CPU that simulates it, not {device}: use bfloat16")
    for name in ("head_dim", "context"):
        if getattr(config, name) % BLOCK:
            raise ConfigError(f"precision fp8 needs {name} to be a multiple of {BLOCK}, got {getattr(config, name)}")


def convert(model: Decoder, device: torch.device, batch_tokens: int | None = None) -> None:
    """Make the linear layers of all blocks compute in FP8, in place. Parameters keep their names and values.

    Args:
        model: model on any device.
        device: device on which it will run.
        batch_tokens: tokens of a step on this rank, over which the loss is a mean; None if a step is one forward pass.

    Raises:
        ConfigError: see ``check``.
    """
    check(model.config, device)
    for block in model.blocks:
        for name, module in block.named_modules():
            if isinstance(module, bounded.Linear):
                width: float = module.weight.shape[1]  # of an input of unit norm
                if name.endswith("out_proj"):
                    # Each head has the norm of its values: 1 with anGPT's factor sqrt(width / head_dim), less without.
                    qkv_proj = block.get_submodule(name.removesuffix("out_proj") + "qkv_proj")
                    assert isinstance(qkv_proj, bounded.Linear)
                    width /= qkv_proj.factor**2
                module.__class__ = StaticLinear
                assert isinstance(module, StaticLinear)
                module.scales, module.batch_tokens = unit_scales(width, *module.weight.shape), batch_tokens
            elif isinstance(module, nn.Linear):
                module.__class__ = DynamicLinear


def unit_scales(input_width: float, fan_out: int, fan_in: int) -> tuple[float, float, float]:
    """Scales of (inputs, weights, gradients per token) of a bounded linear layer, as powers of two.

    Elements of a vector of unit norm have standard deviation 1 / sqrt(width).
    """
    # The gradient of a mean loss of order 1, times the number of tokens, keeps its norm on the way back, as the
    # residual stream does on the way forward.
    return HEADROOM * power_of_two(input_width), power_of_two(fan_in), power_of_two(fan_out)


def power_of_two(width: float) -> float:
    """Nearest power of two to 1 / sqrt(width). Division by it does not round."""
    return 2.0 ** -round(math.log2(width) / 2)


class StaticLinear(bounded.Linear):
    """Bounded linear layer in FP8 with constant scales. Its factor is multiplied into the scale of the product."""

    scales: tuple[float, float, float]
    batch_tokens: int | None = None  # tokens of a step on this rank; None if it is one forward pass

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map (..., fan_in) to (..., fan_out)."""
        weight = self.weight if scale is None else self.weight * scale.to(self.weight.dtype).unsqueeze(1)
        x_scale, weight_scale, gradient_scale = self.scales
        tokens = self.batch_tokens or x.shape[:-1].numel()
        y: Tensor = Product.apply(x, weight, self.factor, x_scale, weight_scale, gradient_scale / tokens)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class DynamicLinear(nn.Linear):
    """torch's linear layer in FP8, with scales computed from each tensor."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., fan_in) to (..., fan_out)."""
        y: Tensor = Product.apply(input, self.weight, 1.0, None, None, None)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Product(torch.autograd.Function):
    """factor * (x weight^T) of x (..., fan_in) and weight (fan_out, fan_in), in FP8 forward and backward.

    A scale is a number, or None to compute it from the tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        factor: float,
        x_scale: float | None,
        weight_scale: float | None,
        gradient_scale: float | None,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x8, x_used = compress(x.flatten(0, -2), torch.float8_e4m3fn, x_scale)
        weight8, weight_used = compress(weight, torch.float8_e4m3fn, weight_scale)
        ctx.save_for_backward(x8, weight8, *(scale for scale in (x_used, weight_used) if isinstance(scale, Tensor)))
        ctx.factor, ctx.scales, ctx.gradient_scale = factor, (x_scale, weight_scale), gradient_scale
        y: Tensor = multiply(x8, weight8.T, factor * x_used * weight_used, dtype).unflatten(0, x.shape[:-1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x8, weight8, *computed = ctx.saved_tensors
        x_scale, weight_scale = computed or ctx.scales
        gradient8, scale = compress(gradient.flatten(0, -2), torch.float8_e5m2, ctx.gradient_scale)
        x_gradient = multiply(gradient8, weight8, ctx.factor * scale * weight_scale, gradient.dtype)
        weight_gradient = multiply(gradient8.T, x8, ctx.factor * scale * x_scale, gradient.dtype)
        return x_gradient.unflatten(0, gradient.shape[:-1]), weight_gradient, None, None, None, None


def compress(x: Tensor, dtype: torch.dtype, scale: float | None) -> tuple[Tensor, float | Tensor]:
    """Return (x / scale rounded to FP8, scale). None chooses the scale that maps amax to the dtype's maximum."""
    limit = torch.finfo(dtype).max
    if scale is None:
        amax = x.abs().amax().float()
        dynamic = torch.where(amax > 0, amax / limit, 1.0)
        return (x / dynamic).clamp(-limit, limit).to(dtype), dynamic
    # Beyond the limit the conversion gives NaN in e4m3 and infinity in e5m2.
    return (x * (1 / scale)).clamp(-limit, limit).to(dtype), scale


def multiply(a: Tensor, b: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """scale * (a b) of two FP8 matrices, as ``dtype``."""
    return scaled_product(a, b, scale, dtype) if a.is_cuda else (a.to(dtype) @ b.to(dtype)) * scale


def scaled_product(a: Tensor, b: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``multiply`` with torch's FP8 matrix product, which also exists on a CPU but is slow there."""
    one = torch.ones((), device=a.device)
    # It needs a in row-major and b in column-major order.
    return torch._scaled_mm(a.contiguous(), b.T.contiguous().T, one * scale, one, out_dtype=dtype)
