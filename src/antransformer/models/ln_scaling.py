"""LayerNorm Scaling: GPT+ whose norms shrink with depth (arXiv:2502.05795, "The Curse of Depth").

What block l reads is rms(x) * gamma / sqrt(l), so that the variance of the residual stream grows less with depth and
deep blocks keep their share in it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from antransformer.models.config import ModelConfig
from antransformer.models.gpt_plus import OPTIONS, RMS_EPS, GPTPlus
from antransformer.models.registry import Architecture


class ScaledNorm(nn.RMSNorm):
    """rms(x) * gamma / sqrt(depth), depth counting from 1."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, eps=RMS_EPS)
        self.scale = depth**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same; the constant rides on gamma."""
        return F.rms_norm(x, self.normalized_shape, self.weight * self.scale, self.eps)


class LNScaling(GPTPlus):
    """GPT+ with these norms before attention and MLP; the norm before the head is GPT+'s."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for depth, block in enumerate(self.blocks, start=1):
            block.attention_norm = ScaledNorm(config.width, depth)
            block.mlp_norm = ScaledNorm(config.width, depth)

    def output_std(self) -> float:
        """That of all other weights: its authors found that the scaling and an initialisation that shrinks with depth
        do not combine, since both damp the blocks."""
        return self.config.init_std


ARCHITECTURE = Architecture(
    name="ln-scaling",
    label="LN scaling",
    description="GPT+ with LayerNorm scaling",
    arxiv="2502.05795",
    cls=LNScaling,
    options=OPTIONS,
    muon_tuned_hyperparameter="model.init_std",
    hf_export=True,
)
