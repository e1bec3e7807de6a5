"""LayerNorm Scaling: GPT+ with norms scaled down by depth (arXiv:2502.05795, "The Curse of Depth").

Block l reads rms(x) * gamma / sqrt(l). The variance of the residual stream then grows more slowly with depth, and deep
blocks contribute more.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from antransformer.models.config import ModelConfig
from antransformer.models.gpt_plus import OPTIONS, RMS_EPS, GPTPlus
from antransformer.models.registry import Architecture


class ScaledNorm(nn.RMSNorm):
    """RMS norm with scale: rms(x) * gamma / sqrt(depth), where depth counts from 1."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, eps=RMS_EPS)
        self.scale = depth**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        # Scaling gamma, a vector, is cheaper than scaling the activations.
        return F.rms_norm(x, self.normalized_shape, self.weight * self.scale, self.eps)


class LNScaling(GPTPlus):
    """GPT+ with scaled norms before attention and MLP; the norm before the head is not scaled."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for depth, block in enumerate(self.blocks, start=1):
            block.attention_norm = ScaledNorm(config.width, depth)
            block.mlp_norm = ScaledNorm(config.width, depth)

    def output_std(self) -> float:
        """Initial standard deviation of ``out_proj`` and ``down_proj``, the same as of all other weights.

        The authors found that an initialization that shrinks with depth does not combine with scaled norms.
        """
        return self.config.init_std


ARCHITECTURE = Architecture(
    name="ln-scaling",
    label="LN scaling",
    description="GPT+ with LayerNorm scaling",
    arxiv="2502.05795",
    cls=LNScaling,
    options=OPTIONS,
    tuned_hyperparameters=("model.init_std", "weight_decay"),
    hf_export=True,
    document_mask=True,
)
