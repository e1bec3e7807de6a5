"""DyT: GPT+ with an elementwise tanh in place of each norm (arXiv:2503.10622, "Transformers without Normalization")."""

import math

import torch
from torch import Tensor, nn

from antransformer.models.config import ModelConfig
from antransformer.models.gpt_plus import OPTIONS, GPTPlus
from antransformer.models.registry import Architecture


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha x) + beta: alpha a learnable scalar, gamma (``weight``) and beta (``bias``) vectors."""

    def __init__(self, width: int, alpha_init: float) -> None:
        super().__init__()
        self.alpha_init = alpha_init
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Put it back to tanh(alpha_init x)."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class DyT(GPTPlus):
    """GPT+ without norms but those of q and k, and with a learnable scalar on the embedding.

    The paper starts alpha before attention higher than elsewhere only from a width of 2048 on; at 1024 both are 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding_scale = nn.Parameter(torch.empty(1))
        for block in self.blocks:
            block.attention_norm = DynamicTanh(config.width, config.dyt_alpha_init)
            block.mlp_norm = DynamicTanh(config.width, config.dyt_alpha_init)
        self.final_norm = DynamicTanh(config.width, config.dyt_alpha_init)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, d), scaled: tanh has no use for coordinates as small as those of unit vectors."""
        return super().embed(tokens) * self.embedding_scale

    def reset_parameters(self) -> None:
        """GPT+'s weights; the scalar on the embedding brings its rows to coordinates of variance 1."""
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
    tuned_hyperparameter="model.dyt_alpha_init",
    hf_export=True,
)
