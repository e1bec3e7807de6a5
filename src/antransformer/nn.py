"""Thin modules around ``functional``: what holds a parameter of the method."""

import torch
from torch import Tensor, nn

from antransformer import functional


class ScaledParameter(nn.Module):
    """A learnable vector s that Adam moves at a chosen relative speed.

    Stored as a surrogate ``value`` that starts at ``scale``; s = (init / scale) * value. Adam's step has about the size
    of the learning rate whatever the parameter's, so s moves by (init / scale) * LR: one global learning rate serves
    matrices and scales alike (arXiv:2410.01131, section 2.5; arXiv:2505.22014, appendix F).

    Args:
        size: number of entries.
        init: the value that s starts from.
        scale: size of the surrogate; the smaller, the faster s moves.
    """

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        self.init, self.scale = init, scale
        self.value = nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        """Put s back at ``init``."""
        nn.init.constant_(self.value, self.scale)

    def forward(self) -> Tensor:
        """The vector s, (size,), in the parameter's dtype."""
        return self.value * (self.init / self.scale)


class Linear(nn.Module):
    """``factor * (W x)`` without bias, rows of W starting at unit norm.

    Keep the rows inside the unit ball by listing the weight among the model's bounds (``antransformer.bounds``).

    Args:
        fan_in: width of the input.
        fan_out: width of the output.
        factor: the constant that brings the output to the wanted norm, as a rule ``factors.linear(fan_in, fan_out)``.
    """

    def __init__(self, fan_in: int, fan_out: int, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def reset_parameters(self) -> None:
        """Draw each row uniformly from the unit sphere."""
        unit_rows_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) to (..., fan_out)."""
        return functional.linear(x, self.weight, self.factor)

    def extra_repr(self) -> str:
        """Shape and factor, for ``print(model)``."""
        fan_out, fan_in = self.weight.shape
        return f"{fan_in}, {fan_out}, factor={self.factor:.4g}"


class Residual(nn.Module):
    """Interpolated residual update with its factor: (x + alpha (y - x)) * nu(alpha).

    Args:
        width: model width d; alpha has one entry a coordinate.
        alpha: its initial value.
        scale: see ``ScaledParameter``.
    """

    def __init__(self, width: int, alpha: float = 0.05, scale: float = 0.03) -> None:
        super().__init__()
        self.alpha = ScaledParameter(width, alpha, scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x and sublayer output y, both (..., width)."""
        return functional.interpolate(x, y, self.alpha())


class ExactResidual(Residual):
    """nGPT's residual update: the same interpolation, normalized exactly."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x and sublayer output y, both (..., width)."""
        return functional.interpolate_exact(x, y, self.alpha())


@torch.no_grad()
def unit_rows_(weight: Tensor) -> Tensor:
    """Fill with rows drawn uniformly from the unit sphere, in place."""
    return weight.normal_().copy_(functional.norm(weight))
