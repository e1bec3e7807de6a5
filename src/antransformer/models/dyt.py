"""DyT: GPT+ with an elementwise tanh instead of each norm (arXiv:2503.10622, "Transformers without Normalization")."""

import math

import torch
from torch import Tensor, nn

from antransformer.models.config import ModelConfig
from antransformer.models.gpt_plus import OPTIONS, GPTPlus
from antransformer.models.registry import Architecture


class DynamicTanh(nn.Module):
    """Elementwise gamma * tanh(alpha x) + beta with a learnable scalar alpha, ``weight`` gamma and ``bias`` beta."""

    def __init__(self, width: int, alpha_init: float) -> None:
        super().__init__()
        self.alpha_init = alpha_init
        self.alpha = nn.Parameter(torch.empty(1))  # one axis, since FSDP refuses parameters without
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Set the function to tanh(alpha_init x)."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class DyT(GPTPlus):
    """GPT+ with tanh instead of its norms (q and k stay normalized) and a learnable scale of the embedding.

    All alphas start at the same value. The paper uses a larger one before attention only at widths of 2048 and more.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding_scale = nn.Parameter(torch.empty(1))
        for block in self.blocks:
            block.attention_norm = DynamicTanh(config.width, config.dyt_alpha_init)
            block.mlp_norm = DynamicTanh(config.width, config.dyt_alpha_init)
        self.final_norm = DynamicTanh(config.width, config.dyt_alpha_init)

    def embed(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to scaled embeddings (B, T, d); tanh is almost linear on the small unscaled ones."""
        return super().embed(tokens) * self.embedding_scale

    def reset_parameters(self) -> None:
        """Initialize as GPT+; the embedding scale gives coordinates of variance 1."""
        super().reset_parameters()
        nn.init.constant_(self.embedding_scale, math.sqrt(self.config.width))
        for module in self.modules():
            if isinstance(module, DynamicTanh):
                module.reset_parameters()


ARCHITECTURE = Architecture(
    name="dyt",
    label="DyT",
    description="GPT+ with dynamic tanh in place of its norms",
    arxiv="2503.10622",
    cls=DyT,
    options={**OPTIONS, "dyt_alpha_init": 1.0},
    tuned_hyperparameters=("model.dyt_alpha_init", "weight_decay"),
    hf_export=True,
    document_mask=True,
)
