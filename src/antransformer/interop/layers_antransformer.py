"""Modules of the architectures in ``modeling_antransformer``. Exported folders have a copy of this file.

Functions and parameter names are those of ``antransformer.models``. All linear maps are plain ``nn.Linear`` modules
with the weights as trained, and the factors multiply their outputs. So tools that replace linear modules, for
quantization or LoRA, work, and what they add passes through the same factors.

Shapes: B batch, T new tokens, S all tokens so far, d model width, n heads, h head width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_antransformer import AntransformerConfig

RMS_EPS = 1e-6

Rotary = tuple[Tensor, Tensor]


def normalize(x: Tensor) -> Tensor:
    """Exact L2 normalization over the last axis, x / ||x||, with the norm in float32."""
    precision = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
    eps = max(1e-12, 1 / torch.finfo(x.dtype).max)
    return x * length.clamp_min(eps).reciprocal().masked_fill(length <= eps, 0).to(x.dtype)


def rotary_tables(positions: Tensor, config: AntransformerConfig) -> Rotary:
    """Cosines and sines of the rotary angles at positions (B, T), each (B, T, rotary_dim / 2), in float32."""
    exponent = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32) / config.rotary_dim
    angles = positions.to(torch.float32).unsqueeze(-1) * config.rope_theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding of the leading coordinates of each head, x (B, T, n, h)."""
    half = rotary[0].shape[-1]
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in rotary)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*rotated, rest], dim=-1)


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention without a fused kernel, which also returns its weights.

    Args:
        module: attention module; required by transformers' interface and not used.
        q: queries (B, n, T, h).
        k, v: keys and values (B, n, S, h).
        mask: additive mask, or None.
        scaling: factor of the scores.

    Returns:
        Output (B, T, n, h) and attention weights (B, n, T, S).
    """
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def silu_factor(std: float) -> float:
    """Factor nu_act = 1 / sqrt(E SiLU(z)^2) for z ~ N(0, std^2), by the trapezoid rule."""
    z = torch.linspace(-38, 38, 2**16 + 1, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2)
    return float(((density * F.silu(z * std).square()).sum() / density.sum()).rsqrt())


def scaled(x: Tensor, factor: float) -> Tensor:
    """Product of x and a constant factor; x itself if the factor is 1."""
    return x if factor == 1.0 else x * factor


class ScaledParameter(nn.Module):
    """Learnable vector (init / scale) * value, where ``value`` starts at ``scale``. A smaller scale is faster."""

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        self.init, self.scale = init, scale
        self.value = nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        """Set all entries to ``init``."""
        nn.init.constant_(self.value, self.scale)

    def resize(self, size: int) -> None:
        """Change the number of entries; new ones have their initial value."""
        old = self.value.detach()
        new = old.new_full((max(0, size - len(old)),), self.scale)
        self.value = nn.Parameter(torch.cat([old[:size], new]), requires_grad=self.value.requires_grad)

    def forward(self) -> Tensor:
        """Vector (size,)."""
        return self.value * (self.init / self.scale)


class Attention(nn.Module):
    """Causal attention softmax(q k^T / sqrt(h)) v."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scaling = config.head_dim**-0.5
        self.qkv_factor = self.out_factor = 1.0
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def scale_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale or normalize q and k (B, T, n, h) as the architecture does."""
        return q, k

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, d) to (B, T, d); returns also the attention weights, or None if the kernel has none."""
        qkv = scaled(self.qkv_proj(x), self.qkv_factor)
        q, k, v = qkv.unflatten(-1, (-1, 3, self.config.head_dim)).unbind(-2)
        q, k = self.scale_heads(rotate(q, rotary), rotate(k, rotary))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(self, q, k, v, mask, scaling=self.scaling, **kwargs)
        return scaled(self.out_proj(y.flatten(2)), self.out_factor), weights


class UnitAttention(Attention):
    """Attention with normalized q and k and a learnable scalar on the scores."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = 1.0
        self.score_scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Set the scale so that scores of random unit vectors have unit variance."""
        nn.init.constant_(self.score_scale, math.sqrt(self.config.head_dim))

    def scale_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize q and k; multiply the scalar into q."""
        return normalize(q) * self.score_scale.to(q.dtype), normalize(k)


class FactoredAttention(UnitAttention):
    """Attention of anGPT: normalized q and k, and constant factors."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.qkv_factor = math.sqrt(config.hidden_size / config.head_dim)
        # Heads of unit norm concatenate to norm sqrt(d / h).
        self.out_factor = math.sqrt(config.head_dim / config.hidden_size)


class SphereAttention(Attention):
    """Attention of nGPT: normalized q and k, both scaled by a learnable vector."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = math.sqrt(config.head_dim)
        self.qk_scale = ScaledParameter(config.hidden_size, 1.0, config.s_scale)

    def scale_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize q and k, and multiply both by the vector's part for each head."""
        scale = self.qk_scale().to(q.dtype).unflatten(0, (-1, self.config.head_dim))
        return normalize(q) * scale, normalize(k) * scale


class MLP(nn.Module):
    """Gated MLP: W_d (u * SiLU(z))."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__()
        self.up_factor = self.gate_factor = self.down_factor = 1.0
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        u, z = scaled(self.up_proj(x), self.up_factor), scaled(self.gate_proj(x), self.gate_factor)
        return scaled(self.down_proj(u * F.silu(z)), self.down_factor)


class FactoredMLP(MLP):
    """MLP of anGPT: constant factors, of which nu_act is part of the up projection's."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        width, hidden = config.hidden_size, config.intermediate_size
        scales = {"none": 1.0, "sqrt_width": math.sqrt(width), "sqrt_mlp": math.sqrt(hidden)}
        nu_uz = math.sqrt(width / hidden)
        self.gate_factor = nu_uz * scales[config.gate_scale]
        self.up_factor = nu_uz * silu_factor(self.gate_factor / math.sqrt(width))
        self.down_factor = math.sqrt(hidden / width)


class ScaledMLP(MLP):
    """MLP of nGPT: learnable vectors scale u and z."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        self.up_scale = ScaledParameter(config.intermediate_size, 1.0, config.s_scale)
        self.gate_scale = ScaledParameter(config.intermediate_size, 1.0, config.s_scale)
        self.gate_factor = math.sqrt(config.hidden_size)  # gives the input of SiLU unit variance

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        u, z = self.up_proj(x), self.gate_proj(x)
        u, z = u * self.up_scale().to(u.dtype), z * (self.gate_scale() * self.gate_factor).to(z.dtype)
        y: Tensor = self.down_proj(u * F.silu(z))
        return y


class RMSNorm(nn.RMSNorm):
    """RMS norm rms(x) * gamma; ``depth`` is not used."""

    def __init__(self, config: AntransformerConfig, depth: int) -> None:
        super().__init__(config.hidden_size, eps=RMS_EPS)


class ScaledNorm(RMSNorm):
    """RMS norm rms(x) * gamma / sqrt(depth), where depth counts from 1 (arXiv:2502.05795)."""

    def __init__(self, config: AntransformerConfig, depth: int) -> None:
        super().__init__(config, depth)
        self.scale = depth**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return F.rms_norm(x, self.normalized_shape, self.weight * self.scale, self.eps)


class DynamicTanh(nn.Module):
    """Elementwise gamma * tanh(alpha x) + beta (arXiv:2503.10622)."""

    def __init__(self, config: AntransformerConfig, depth: int) -> None:
        super().__init__()
        self.alpha_init = config.dyt_alpha_init
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def reset_parameters(self) -> None:
        """Set the function to tanh(alpha_init x)."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class Sum(nn.Module):
    """Residual sum x + y."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., d)."""
        return x + y


class Interpolation(nn.Module):
    """Residual update of anGPT: (x + alpha (normalize(y) - x)) * nu(alpha)."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__()
        self.alpha = ScaledParameter(config.hidden_size, config.alpha_init, config.s_scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., d), in float32."""
        precision = torch.promote_types(x.dtype, torch.float32)
        alpha = self.alpha().to(precision)
        nu = torch.rsqrt(alpha.square() + (1 - alpha).square())
        z: Tensor = (x * ((1 - alpha) * nu) + normalize(y.to(precision)) * (alpha * nu)).to(x.dtype)
        return z


class ExactInterpolation(Interpolation):
    """Residual update of nGPT: normalize(x + |alpha| (normalize(y) - x))."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., d)."""
        return normalize(torch.lerp(x, normalize(y).to(x.dtype), self.alpha().abs().to(x.dtype)))


class Bound(NamedTuple):
    """Constraint on the vectors of a weight along an axis: norm at most 1, or exactly 1 if strict.

    ``antransformer.bind(model, optimizer)`` projects the weights after each optimizer step.
    """

    name: str
    parameter: Tensor
    axis: int = 1
    strict: bool = False


BOUNDED = tuple(
    f"{name}.weight" for name in ("embedding", "qkv_proj", "out_proj", "up_proj", "gate_proj", "down_proj", "lm_head")
)


def model_axis_bound(name: str, weight: Tensor) -> Bound:
    """Strict bound along the model width: columns of ``out_proj`` and ``down_proj``, rows of all other matrices."""
    return Bound(name, weight, axis=0 if name.endswith(("out_proj.weight", "down_proj.weight")) else 1, strict=True)


class Parts(NamedTuple):
    """Modules and bounds that differ between architectures.

    Attributes:
        attention, mlp, norm, residual: constructors of the modules of a block; the norm is also used before the head.
        bound: bound of a weight matrix, by its name; None for no bounds.
        scaled_head: whether a learnable vector scales the logits.
        scaled_embedding: whether a learnable scalar scales the embedding.
    """

    attention: Callable[[AntransformerConfig, int], nn.Module]
    mlp: Callable[[AntransformerConfig], nn.Module]
    norm: Callable[[AntransformerConfig, int], nn.Module]
    residual: Callable[[AntransformerConfig], nn.Module]
    bound: Callable[[str, Tensor], Bound] | None = None
    scaled_head: bool = False
    scaled_embedding: bool = False


PARTS = {
    "angpt": Parts(FactoredAttention, FactoredMLP, nn.Identity, Interpolation, Bound, scaled_head=True),
    "ngpt": Parts(SphereAttention, ScaledMLP, nn.Identity, ExactInterpolation, model_axis_bound, scaled_head=True),
    "gpt+": Parts(UnitAttention, MLP, RMSNorm, Sum),
    "gpt": Parts(Attention, MLP, RMSNorm, Sum),
    "ln-scaling": Parts(UnitAttention, MLP, ScaledNorm, Sum),
    "dyt": Parts(UnitAttention, MLP, DynamicTanh, Sum, scaled_embedding=True),
}
