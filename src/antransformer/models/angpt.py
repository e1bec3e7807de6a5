"""anGPT, the approximately normalized GPT (arXiv:2505.22014, table 1, right column).

Constant factors are parts of matrix products, where they cost nothing. nu_act is part of the up projection's factor,
since act(u, z) = u * SiLU(z) is linear in u. The exact normalization of both sublayer outputs cancels nu_p, nu_act and
nu_d, and that of q and k cancels their part of nu_qkv. These factors keep hidden activations at their intended norms;
the function is the same without them.
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
    """Causal attention with normalized q and k and a learnable scalar on the scores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.head_dim
        self.head_dim = head_dim
        # Each head has unit norm, so their concatenation has norm sqrt(d / h), which nu_p compensates.
        self.qkv_proj = Linear(width, 3 * width, factor=factors.linear(width, head_dim))
        self.out_proj = Linear(width, width, factor=math.sqrt(head_dim / width))
        self.score_scale = nn.Parameter(torch.empty(1))  # one axis, since FSDP refuses parameters without

    def reset_parameters(self) -> None:
        """Set the scale so that scores of random unit vectors have unit variance."""
        nn.init.constant_(self.score_scale, math.sqrt(self.head_dim))

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim)
        q = normalize(rotate(q, ctx.rotary)) * self.score_scale.to(q.dtype)
        k = normalize(rotate(k, ctx.rotary))
        y: Tensor = self.out_proj(causal_attention(q, k, v, ctx))
        return y


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
        """Map (B, T, d) to (B, T, d)."""
        y: Tensor = self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))
        return y


class Block(nn.Module):
    """Attention and MLP, each normalized exactly and interpolated into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_residual = Residual(config.width, config.alpha_init, config.s_scale)
        self.mlp = MLP(config)
        self.mlp_residual = Residual(config.width, config.alpha_init, config.s_scale)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d)."""
        x = self.attention_residual(x, self.attention(x, ctx))
        x = self.mlp_residual(x, self.mlp(x))
        return x


class AnGPT(Decoder):
    """The approximately normalized GPT; rows of all weight matrices have norm at most 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Block)
        self.lm_head = Linear(config.width, config.vocab_size, factor=1.0)
        size = config.vocab_size if config.logit_scale == "vector" else 1
        self.logit_scale = ScaledParameter(size, 1.0, config.s_scale)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits are s_Z * (W_h x); s_Z is multiplied into the weight."""
        # A product with the weight (V, d) is cheaper than one with the logits (tokens, V).
        weight = self.lm_head.weight
        return hidden, weight * self.logit_scale().to(weight.dtype).unsqueeze(1)

    def bounds(self) -> list[Bound]:
        """Rows of all matrices, including embedding and head."""
        return [Bound(name, weight, axis=1) for name, weight in self.named_parameters() if weight.ndim == 2]

    def reset_parameters(self) -> None:
        """Draw all rows uniformly from the unit sphere and set all scales to their initial values."""
        unit_rows_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, (Linear, ScaledParameter, Attention)):
                module.reset_parameters()


def gate_scale(config: ModelConfig) -> float:
    """Constant factor of the gate, in addition to nu_uz."""
    scales = {
        "none": 1.0,  # as printed in the paper, which leaves |z| <= 1/2: an almost linear gate
        "sqrt_width": math.sqrt(config.width),  # as in nGPT; z has deviation 1/2, which the printed nu_act implies
        "sqrt_mlp": math.sqrt(config.mlp_hidden),  # gives z unit variance
    }
    return scales[config.gate_scale]


ARCHITECTURE = Architecture(
    name="angpt",
    label="anGPT",
    description="anGPT, the approximately normalized transformer",
    arxiv="2505.22014",
    cls=AnGPT,
    # How the defaults were chosen: docs/log.md, "Defaults of the first models".
    options={
        "alpha_init": 0.05,
        "s_scale": 0.03,
        "gate_scale": "sqrt_width",
        "logit_scale": "vector",
        "ablation": "none",
    },
    defaults_like="angpt",
    tuned_hyperparameters=("model.s_scale",),
    tensor_parallel={**TENSOR_PARALLEL, "logit_scale": 0},
    hf_export=True,
    document_mask=True,
)
