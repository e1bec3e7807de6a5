"""nGPT, the normalized transformer on the hypersphere (arXiv:2410.01131).

Weight vectors along the model axis have unit norm after every step: rows of projections that read the residual stream,
columns of projections that write to it. Exact normalization takes the place of anGPT's constant factors.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from antransformer.bounds import Bound, project_
from antransformer.functional import AttentionContext, causal_attention, normalize, rotate, split_heads
from antransformer.models.config import ModelConfig
from antransformer.models.decoder import Decoder
from antransformer.models.registry import Architecture
from antransformer.nn import ExactResidual, Linear, ScaledParameter, unit_rows_


class Attention(nn.Module):
    """Causal attention with normalized q and k and one learnable vector s_qk that scales both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = Linear(config.width, 3 * config.width, factor=1.0)
        self.out_proj = Linear(config.width, config.width, factor=1.0)
        self.qk_scale = ScaledParameter(config.width, 1.0, config.s_scale)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim)
        s_qk = self.qk_scale().to(q.dtype).unflatten(0, (-1, self.head_dim))
        q, k = normalize(rotate(q, ctx.rotary)) * s_qk, normalize(rotate(k, ctx.rotary)) * s_qk
        # At s_qk = 1 the scale gives scores of random directions unit variance.
        y: Tensor = self.out_proj(causal_attention(q, k, v, ctx, scale=math.sqrt(self.head_dim)))
        return y


class MLP(nn.Module):
    """Gated MLP with a learnable scale for each hidden coordinate of u and z."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.width, config.mlp_hidden, factor=1.0)
        # Coordinates of W_z x have variance 1 / d; the factor gives the input of SiLU unit variance.
        self.gate_proj = Linear(config.width, config.mlp_hidden, factor=math.sqrt(config.width))
        self.down_proj = Linear(config.mlp_hidden, config.width, factor=1.0)
        self.up_scale = ScaledParameter(config.mlp_hidden, 1.0, config.s_scale)
        self.gate_scale = ScaledParameter(config.mlp_hidden, 1.0, config.s_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        u, z = self.up_proj(x, self.up_scale()), self.gate_proj(x, self.gate_scale())
        y: Tensor = self.down_proj(u * F.silu(z))
        return y


class Block(nn.Module):
    """Attention and MLP, each normalized and interpolated; the result is normalized again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_residual = ExactResidual(config.width, config.alpha_init, config.s_scale)
        self.mlp = MLP(config)
        self.mlp_residual = ExactResidual(config.width, config.alpha_init, config.s_scale)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d), unit norm."""
        x = self.attention_residual(x, self.attention(x, ctx))
        x = self.mlp_residual(x, self.mlp(x))
        return x


class NGPT(Decoder):
    """The normalized transformer; weight vectors along the model axis have norm 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Block)
        self.lm_head = Linear(config.width, config.vocab_size, factor=1.0)
        self.logit_scale = ScaledParameter(config.vocab_size, 1.0, config.s_scale)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits are s_Z * (W_h x); s_Z is multiplied into the weight."""
        # A product with the weight (V, d) is cheaper than one with the logits (tokens, V).
        weight = self.lm_head.weight
        return hidden, weight * self.logit_scale().to(weight.dtype).unsqueeze(1)

    def bounds(self) -> list[Bound]:
        """Strict bounds along the model axis: columns of ``out_proj`` and ``down_proj``, rows of all other matrices."""
        return [
            Bound(name, weight, axis=model_axis(name), strict=True)
            for name, weight in self.named_parameters()
            if weight.ndim == 2
        ]

    def reset_parameters(self) -> None:
        """Draw Gaussian weights, normalize them along the model axis, and set all scales to their initial values."""
        unit_rows_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, (Linear, ScaledParameter)):
                module.reset_parameters()
        project_(self.bounds())  # Linear draws unit rows, and two of the matrices need unit columns


def model_axis(name: str) -> int:
    """Axis of length d of the matrix with this name: 0 if it writes to the residual stream, else 1."""
    return 0 if name.endswith(("out_proj.weight", "down_proj.weight")) else 1


ARCHITECTURE = Architecture(
    name="ngpt",
    label="nGPT",
    description="nGPT, the normalized transformer",
    arxiv="2410.01131",
    cls=NGPT,
    options={"alpha_init": 0.05, "s_scale": 0.03},
    defaults_like="angpt",
    tuned_hyperparameters=("model.s_scale",),
    hf_export=True,
    document_mask=True,
)
