"""Handwritten digits: a small ViT in its approximately normalized form, against the same ViT with pre-norm.

    pip install '.[examples]'
    python examples/digits.py    # under two minutes on 2 CPU cores

The data are the 1,797 images of 8 x 8 pixels in scikit-learn. The baseline is torch's own encoder with biases,
LayerNorm, AdamW and warm-up. The approximately normalized model has no pre-norms, no weight decay and no warm-up.
"""

import torch
import torch.nn.functional as F
from side_by_side import Split, Variant, compare, options, split
from sklearn.datasets import load_digits
from torch import Tensor, nn

from antransformer import factors
from antransformer.blocks import EncoderBlock
from antransformer.functional import normalize
from antransformer.nn import MLP, Attention, Embedding, Head, Linear

WIDTH, HEADS, LAYERS, PATCHES, PIXELS, CLASSES = 64, 4, 3, 16, 4, 10
LRS = (3e-3, 1e-2, 3e-2)


class ApproximatelyNormalizedViT(nn.Module):
    """Exact norms at the input and after each sublayer; constant factors everywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Linear(PIXELS, WIDTH, bias=True)  # with a bias brightness survives the norm
        self.positions = Embedding(PATCHES, WIDTH)
        self.blocks = nn.Sequential(
            *(EncoderBlock(Attention(WIDTH, HEADS), MLP(WIDTH, gated=False, activation=F.gelu)) for _ in range(LAYERS))
        )
        self.head = Head(WIDTH, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, patches, pixels) to logits (B, classes)."""
        x = (normalize(self.patches(patches)) + self.positions.weight) * factors.sum_residual()
        return self.head(normalize(self.blocks(x).mean(1)))


class PreNormViT(nn.Module):
    """Torch's encoder with a LayerNorm before each sublayer and at the end."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.patches = nn.Linear(PIXELS, WIDTH)
        self.positions = nn.Embedding(PATCHES, WIDTH)  # from N(0, 1): with the usual 0.02 it learns far more slowly
        self.blocks = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, patches, pixels) to logits (B, classes)."""
        return self.head(self.blocks(self.patches(patches) + self.positions.weight).mean(1))


def data() -> Split:
    """Patches of 2 x 2 pixels between -1 and 1, and digits."""
    images, digits = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 4, 2, 4, 2) / 8 - 1
    return split(pixels.transpose(2, 3).reshape(-1, PATCHES, PIXELS), torch.tensor(digits), parts=(1 / 6, 1 / 3))


def main() -> None:
    """Compare both models and print the result."""
    arguments = options("ViT on digits: approximately normalized against pre-norm", epochs=20)
    bounded = Variant("anTransformer", ApproximatelyNormalizedViT, LRS, bounded=True)
    baseline = Variant("pre-norm", PreNormViT, LRS, weight_decay=0.1, warmup=0.1)
    compare([bounded, baseline], data(), arguments.epochs, arguments.seeds)


if __name__ == "__main__":
    main()
