"""GPT: GPT+ without QK norm.

Baseline of the second comparison in arXiv:2505.22014, section 5. q and k are not normalized, and scores have the
constant scale of arXiv:1706.03762.
"""

from torch import Tensor, nn

from antransformer.functional import AttentionContext, causal_attention, rotate, split_heads
from antransformer.models.config import ModelConfig
from antransformer.models.gpt_plus import OPTIONS, GPTPlus
from antransformer.models.registry import Architecture


class Attention(nn.Module):
    """Causal attention, softmax(q k^T / sqrt(h)) v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim)
        q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        y: Tensor = self.out_proj(causal_attention(q, k, v, ctx, scale=self.head_dim**-0.5))
        return y


class GPT(GPTPlus):
    """GPT+ with plain attention in its blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.attention = Attention(config)


ARCHITECTURE = Architecture(
    name="gpt",
    label="GPT",
    description="GPT+ without QK norm",
    cls=GPT,
    options=OPTIONS,
    tuned_hyperparameters=("model.init_std", "weight_decay"),
    hf_export=True,
    document_mask=True,
)
