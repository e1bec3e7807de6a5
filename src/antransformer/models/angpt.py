"""anGPT, the approximately normalized GPT (arXiv:2505.22014, table 1, right column).

Reads like that column. Every constant factor is part of a matrix product, where it costs least; nu_act rides on the up
projection, since act(u, z) is linear in u. The exact norms behind the output and down projections cancel nu_p, nu_act
and nu_d (and those of q and k their share of nu_qkv): these factors keep the hidden activations at their norms and the
function is the same without.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import factors
from antransformer.bounds import Bound
from antransformer.functional import AttentionContext, causal_attention, normalize, rotate, split_heads
from antransformer.models.config import ModelConfig
from antransformer.models.decoder import TENSOR_PARALLEL, Decoder
from antransformer.models.registry import Architecture
from antransformer.nn import Linear, Residual, ScaledParameter, unit_rows_


class Attention(nn.Module):
    """Causal attention on q and k of unit norm, with a learnable scalar on the scores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head = config.width, config.head_dim
        self.head_dim = head
        self.qkv_proj = Linear(width, 3 * width, factor=factors.linear(width, head))
        self.out_proj = Linear(width, width, factor=math.sqrt(head / width))
        self.score_scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Scores of random unit vectors get unit variance."""
        nn.init.constant_(self.score_scale, math.sqrt(self.head_dim))

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim)
        q = normalize(rotate(q, ctx.rotary)) * self.score_scale.to(q.dtype)
        k = normalize(rotate(k, ctx.rotary))
        return self.out_proj(causal_attention(q, k, v, ctx))


class MLP(nn.Module):
    """Gated MLP: W_d (u * SiLU(z))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_hidden
        nu_uz = factors.linear(width, hidden)
        gate_factor = nu_uz * gate_scale(config)
        # Coordinates of W_z x have variance 1 / d before the factor.
        nu_act = factors.activation(F.silu, std=gate_factor / math.sqrt(width))
        self.up_proj = Linear(width, hidden, factor=nu_uz * nu_act)
        self.gate_proj = Linear(width, hidden, factor=gate_factor)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))


class Block(nn.Module):
    """Attention and MLP, each normalized exactly and interpolated into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_residual = Residual(config.width, config.alpha_init, config.s_scale)
        self.mlp = MLP(config)
        self.mlp_residual = Residual(config.width, config.alpha_init, config.s_scale)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Residual stream (B, T, d) to the same."""
        x = self.attention_residual(x, self.attention(x, ctx))
        return self.mlp_residual(x, self.mlp(x))


class AnGPT(Decoder):
    """The model; every row of every weight matrix is bounded by 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Block)
        self.lm_head = Linear(config.width, config.vocab_size, factor=1.0)
        self.logit_scale = ScaledParameter(config.vocab_size, 1.0, config.s_scale)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """s_Z * (W_h x), with s_Z applied to the weight."""
        weight = self.lm_head.weight
        return hidden, weight * self.logit_scale().to(weight.dtype).unsqueeze(1)

    def bounds(self) -> list[Bound]:
        """Rows of all matrices, of the embedding and of the head."""
        return [Bound(name, weight, axis=1) for name, weight in self.named_parameters() if weight.ndim == 2]

    def reset_parameters(self) -> None:
        """Unit rows everywhere."""
        unit_rows_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, (Linear, ScaledParameter, Attention)):
                module.reset_parameters()


def gate_scale(config: ModelConfig) -> float:
    """The constant on the gate beside nu_uz.

    The printed form has none and leaves |z| <= 1/2, an almost linear gate; nGPT has sqrt(d), which the printed
    nu_act = 3.74 implies (z of standard deviation 1/2); sqrt(f) gives z unit variance.
    """
    return {"none": 1.0, "sqrt_width": math.sqrt(config.width), "sqrt_mlp": math.sqrt(config.mlp_hidden)}[
        config.gate_scale
    ]


ARCHITECTURE = Architecture(
    name="angpt",
    label="anGPT",
    description="anGPT, the approximately normalized transformer",
    arxiv="2505.22014",
    cls=AnGPT,
    # How the defaults were chosen: docs/log.md, "Defaults of the first models".
    options={"alpha_init": 0.05, "s_scale": 0.03, "gate_scale": "sqrt_width", "ablation": "none"},
    defaults_like="angpt",
    tuned_hyperparameter="model.s_scale",
    tensor_parallel={**TENSOR_PARALLEL, "logit_scale": 0},
    hf_export=True,
)
