"""anGPT (arXiv:2505.22014), nGPT (arXiv:2410.01131), GPT+ and its variants for Hugging Face's transformers.

Exported folders have a copy of this file, so it imports nothing from antransformer. Functions and parameter names are
those of ``antransformer.models``. A block is

    x = residual(x, attention(norm(x)))
    x = residual(x, mlp(norm(x)))

and ``PARTS`` has the attention, MLP, norm and residual of each architecture.

Shapes: B batch, T new tokens, S all tokens so far, d model width, n heads, h head width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_antransformer import AntransformerConfig

RMS_EPS = 1e-6

Rotary = tuple[Tensor, Tensor]


def normalize(x: Tensor) -> Tensor:
    """Exact L2 normalization over the last axis, x / ||x||, with the norm in float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x * length.clamp_min(1e-12).reciprocal().to(x.dtype)


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


class Linear(nn.Module):
    """Linear map ``scale * (W x)`` with the scale multiplied into the weight: a constant, or one scale per output."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.factor = 1.0
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def reset_parameters(self) -> None:
        """Draw rows of about unit norm."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map (..., fan_in) to (..., fan_out); a scale (fan_out,) replaces the constant factor."""
        if scale is not None:
            return F.linear(x, self.weight * scale.to(self.weight.dtype).unsqueeze(1))
        return F.linear(x, self.weight if self.factor == 1.0 else self.weight * self.factor)


class ScaledParameter(nn.Module):
    """Learnable vector (init / scale) * value, where ``value`` starts at ``scale``. A smaller scale is faster."""

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        self.init, self.scale = init, scale
        self.value = nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        """Set all entries to ``init``."""
        nn.init.constant_(self.value, self.scale)

    def forward(self) -> Tensor:
        """Vector (size,)."""
        return self.value * (self.init / self.scale)


class Attention(nn.Module):
    """Causal attention softmax(q k^T / sqrt(h)) v."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scaling = config.head_dim**-0.5
        self.qkv_proj = Linear(config.width, 3 * config.width)
        self.out_proj = Linear(config.width, config.width)

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale or normalize q and k (B, T, n, h) as the architecture does."""
        return q, k

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, d) to (B, T, d); returns also the attention weights, or None if the kernel has none."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, 3, self.config.head_dim)).unbind(-2)
        q, k = self.scaled(rotate(q, rotary), rotate(k, rotary))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(self, q, k, v, mask, scaling=self.scaling, **kwargs)
        return self.out_proj(y.flatten(2)), weights


class UnitAttention(Attention):
    """Attention with normalized q and k and a learnable scalar on the scores."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = 1.0
        self.score_scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Set the scale so that scores of random unit vectors have unit variance."""
        nn.init.constant_(self.score_scale, math.sqrt(self.config.head_dim))

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize q and k; multiply the scalar into q."""
        return normalize(q) * self.score_scale.to(q.dtype), normalize(k)


class FactoredAttention(UnitAttention):
    """Attention of anGPT: normalized q and k, and constant factors."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.qkv_proj.factor = math.sqrt(config.width / config.head_dim)
        # Heads of unit norm concatenate to norm sqrt(d / h).
        self.out_proj.factor = math.sqrt(config.head_dim / config.width)


class SphereAttention(Attention):
    """Attention of nGPT: normalized q and k, both scaled by a learnable vector."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = math.sqrt(config.head_dim)
        self.qk_scale = ScaledParameter(config.width, 1.0, config.s_scale)

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize q and k, and multiply both by the vector's part for each head."""
        scale = self.qk_scale().to(q.dtype).unflatten(0, (-1, self.config.head_dim))
        return normalize(q) * scale, normalize(k) * scale


class MLP(nn.Module):
    """Gated MLP: W_d (u * SiLU(z))."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.width, config.mlp_hidden)
        self.gate_proj = Linear(config.width, config.mlp_hidden)
        self.down_proj = Linear(config.mlp_hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        return self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))


class FactoredMLP(MLP):
    """MLP of anGPT: constant factors, of which nu_act is part of the up projection's."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        scales = {"none": 1.0, "sqrt_width": math.sqrt(config.width), "sqrt_mlp": math.sqrt(config.mlp_hidden)}
        nu_uz = math.sqrt(config.width / config.mlp_hidden)
        self.gate_proj.factor = nu_uz * scales[config.gate_scale]
        self.up_proj.factor = nu_uz * silu_factor(self.gate_proj.factor / math.sqrt(config.width))
        self.down_proj.factor = math.sqrt(config.mlp_hidden / config.width)


class ScaledMLP(MLP):
    """MLP of nGPT: learnable vectors scale u and z."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        self.up_scale = ScaledParameter(config.mlp_hidden, 1.0, config.s_scale)
        self.gate_scale = ScaledParameter(config.mlp_hidden, 1.0, config.s_scale)
        self.gate_factor = math.sqrt(config.width)  # gives the input of SiLU unit variance

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        u, z = self.up_proj(x, self.up_scale()), self.gate_proj(x, self.gate_scale() * self.gate_factor)
        return self.down_proj(u * F.silu(z))


class RMSNorm(nn.RMSNorm):
    """RMS norm rms(x) * gamma; ``depth`` is not used."""

    def __init__(self, config: AntransformerConfig, depth: int) -> None:
        super().__init__(config.width, eps=RMS_EPS)


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
        self.weight = nn.Parameter(torch.empty(config.width))
        self.bias = nn.Parameter(torch.empty(config.width))

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
        self.alpha = ScaledParameter(config.width, config.alpha_init, config.s_scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., d), in float32."""
        precision = torch.promote_types(x.dtype, torch.float32)
        alpha = self.alpha().to(precision)
        nu = torch.rsqrt(alpha.square() + (1 - alpha).square())
        return (x * ((1 - alpha) * nu) + normalize(y.to(precision)) * (alpha * nu)).to(x.dtype)


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


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each added to or interpolated into the residual stream."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__()
        parts = PARTS[config.architecture]
        self.attention_norm = parts.norm(config, layer_idx + 1)
        self.attention = parts.attention(config, layer_idx)
        self.attention_residual = parts.residual(config)
        self.mlp_norm = parts.norm(config, layer_idx + 1)
        self.mlp = parts.mlp(config)
        self.mlp_residual = parts.residual(config)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d)."""
        y, _ = self.attention(self.attention_norm(x), rotary, mask, cache, **kwargs)
        x = self.attention_residual(x, y)
        return self.mlp_residual(x, self.mlp(self.mlp_norm(x)))


class AntransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model; embedding and head are not tied."""

    config: AntransformerConfig
    config_class = AntransformerConfig
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        parts = PARTS[config.architecture]
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.embedding_scale = nn.Parameter(torch.empty(1)) if parts.scaled_embedding else None
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.layers))
        self.final_norm = parts.norm(config, 1)
        self.lm_head = Linear(config.width, config.vocab_size)
        self.logit_scale = ScaledParameter(config.vocab_size, 1.0, config.s_scale) if parts.scaled_head else None
        self.gradient_checkpointing = False  # set by transformers, which then disables the cache
        self.post_init()

    def bounds(self) -> list[Bound]:
        """Constraints on the weights; an empty list for an architecture without bounds."""
        # The method has the name and the result that antransformer.bind looks for.
        bound = PARTS[self.config.architecture].bound
        matrices = [(name, weight) for name, weight in self.named_parameters() if weight.ndim == 2]
        return [bound(name, weight) for name, weight in matrices] if bound else []

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Map token ids (B, T), or their embeddings (B, T, d), to logits (B, T, V); arguments as usual in transformers.

        The loss is the mean cross-entropy of labels (B, T) given the preceding tokens; labels of -100 are ignored.
        ``past_key_values`` is the name of ``cache`` in transformers before 5.24.

        Raises:
            ValueError: both ids and embeddings are given, or neither is.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        rotary = rotary_tables(position_ids, self.config)
        for block in self.blocks:
            x = block(x, rotary, mask, cache=cache, **kwargs)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(x[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, cache
        )  # by position: the name of the cache differs between releases

    def logits(self, x: Tensor) -> Tensor:
        """Map the residual stream after the last block (..., d) to logits (..., V)."""
        return self.lm_head(self.final_norm(x), None if self.logit_scale is None else self.logit_scale())

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module: rows of about unit norm, where ``antransformer.build`` draws exact ones."""
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.width**-0.5)
        elif reset is not None:
            reset()
        elif module is self and self.embedding_scale is not None:
            nn.init.constant_(self.embedding_scale, math.sqrt(self.config.width))
