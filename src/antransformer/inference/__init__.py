"""Text generation from trained models."""

from antransformer.inference.folding import FoldedAnGPT, fold
from antransformer.inference.sampling import generate

__all__ = ["FoldedAnGPT", "fold", "generate"]
