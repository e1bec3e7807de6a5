"""GPT+, the baseline: a well-built GPT with pre-norm RMSNorm, rotary embedding, gated MLP and QK norm.

arXiv:2505.22014, table 1, left column. It shares only rotary embedding, normalization of q and k, and the attention
kernel with anGPT, so that the baseline is not a special case of the method.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer.bounds import Bound
from antransformer.functional import AttentionContext, causal_attention, normalize, rotate, split_heads
from antransformer.models.config import ModelConfig
from antransformer.models.decoder import TENSOR_PARALLEL, Decoder
from antransformer.models.registry import Architecture

RMS_EPS = 1e-6


class Attention(nn.Module):
    """Causal attention with normalized q and k and a learnable scalar on the scores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        self.score_scale = nn.Parameter(torch.empty(1))  # one axis, since FSDP refuses parameters without

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
        self.up_proj = nn.Linear(config.width, config.mlp_hidden, bias=False)
        self.gate_proj = nn.Linear(config.width, config.mlp_hidden, bias=False)
        self.down_proj = nn.Linear(config.mlp_hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        y: Tensor = self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))
        return y


class Block(nn.Module):
    """Pre-norm attention and MLP, added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=RMS_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=RMS_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d)."""
        x = x + self.attention(self.attention_norm(x), ctx)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPTPlus(Decoder):
    """The baseline GPT+, trained with weight decay instead of bounds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Block)
        self.final_norm: nn.Module = nn.RMSNorm(config.width, eps=RMS_EPS)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits are W_h (rms(x) * gamma_h)."""
        return self.final_norm(hidden), self.lm_head.weight

    def bounds(self) -> list[Bound]:
        """No bounds."""
        return []

    def reset_parameters(self) -> None:
        """Draw Gaussian weights and set the gains of the norms to 1."""
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
            elif name.endswith("score_scale"):
                nn.init.constant_(weight, math.sqrt(self.config.head_dim))
            elif name.endswith(("out_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=self.output_std())
            else:
                nn.init.normal_(weight, std=self.config.init_std)

    def output_std(self) -> float:
        """Initial standard deviation of ``out_proj`` and ``down_proj``; it shrinks with depth, as in GPT-2."""
        return self.config.init_std / math.sqrt(2 * self.config.layers)


# Options of GPT+ and of the architectures made from it.
OPTIONS = {"init_std": lambda config: config.width**-0.5}

ARCHITECTURE = Architecture(
    name="gpt+",
    label="GPT+",
    description="GPT+: pre-norm RMSNorm, rotary embedding, gated MLP, QK norm",
    cls=GPTPlus,
    options=OPTIONS,
    # With separate learning rates smaller initial weights gain up to 0.15 nats, and less weight decay helps too:
    # docs/results.md, "Convergence speedup".
    tuned_hyperparameters=("model.init_std", "weight_decay"),
    tensor_parallel=TENSOR_PARALLEL,
    hf_export=True,
    document_mask=True,
)
