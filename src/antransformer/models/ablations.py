"""Ablations: anGPT with one part of the method changed or removed (arXiv:2505.22014, section 5).

Ablations replace factors, residual updates or bounds of a finished model, so that angpt.py contains only the method.
Of the constant factors only nu_uz of the gate changes the function; exact normalization cancels the others. At the
usual MLP ratio of 4, nu_uz is 1/2, so constant-x2 and constant-none are the same function. Bounds do not change the
function: strict, model-axis and no-bounds change only training.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from antransformer import factors
from antransformer.bounds import Bound, project_
from antransformer.functional import normalize
from antransformer.models.angpt import AnGPT, Block, gate_scale
from antransformer.models.config import ModelConfig
from antransformer.models.ngpt import model_axis
from antransformer.nn import Residual

Change = Callable[[float], float]
MakeResidual = Callable[[int, float, float], nn.Module]  # called with the arguments of Residual


class RescaledResidual(Residual):
    """Interpolation with nu(alpha) multiplied by ``multiplier``."""

    def __init__(self, width: int, alpha: float, scale: float, multiplier: float) -> None:
        super().__init__(width, alpha, scale)
        self.multiplier = multiplier

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., width)."""
        return super().forward(x, y) * self.multiplier


class BareResidual(Residual):
    """Interpolation without its factor: x + alpha (normalize(y) - x)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., width)."""
        return torch.lerp(x, normalize(y).to(x.dtype), self.alpha().to(x.dtype))


class SumResidual(nn.Module):
    """Residual sum with its factor: (x + normalize(y)) / sqrt(2)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y, both (..., width)."""
        return (x + normalize(y)) * factors.sum_residual()


class ChangedAnGPT(AnGPT):
    """anGPT with other constant factors in its blocks, or another residual update.

    Args:
        config: sizes and options.
        constants: function from a constant factor nu to its replacement.
        residual: constructor of the residual update of a sublayer.
    """

    def __init__(
        self, config: ModelConfig, constants: Change | None = None, residual: MakeResidual | None = None
    ) -> None:
        super().__init__(config)
        for block in self.blocks:
            if constants:
                change_constants(block, config, constants)
            if residual:
                block.attention_residual = residual(config.width, config.alpha_init, config.s_scale)
                block.mlp_residual = residual(config.width, config.alpha_init, config.s_scale)


class StrictAnGPT(AnGPT):
    """anGPT with strict bounds: norms are exactly 1, as in nGPT."""

    def bounds(self) -> list[Bound]:
        """Bounds of anGPT, made strict."""
        return [replace(bound, strict=True) for bound in super().bounds()]


class ModelAxisAnGPT(AnGPT):
    """anGPT with bounds along the model axis, as in nGPT: columns of projections that write to the residual stream."""

    def bounds(self) -> list[Bound]:
        """Bounds of anGPT along the axes of nGPT."""
        return [replace(bound, axis=model_axis(bound.name)) for bound in super().bounds()]

    def reset_parameters(self) -> None:
        """Initialize with unit norm along the axis of each bound."""
        super().reset_parameters()
        # Strict here only, so that columns start at norm 1 and not below it.
        project_(replace(bound, strict=True) for bound in self.bounds())


class UnboundedAnGPT(AnGPT):
    """anGPT whose weight rows start at norm 1 and are not bounded in training."""

    def bounds(self) -> list[Bound]:
        """No bounds."""
        return []


def change_constants(block: nn.Module, config: ModelConfig, change: Change) -> None:
    """Replace every constant factor nu of an anGPT block by ``change(nu)``."""
    assert isinstance(block, Block)  # for mypy: ModuleList holds modules of any type
    attention, mlp = block.attention, block.mlp
    for linear in (attention.qkv_proj, attention.out_proj, mlp.down_proj):
        linear.factor = change(linear.factor)
    # The factor of the up projection is a product of two. The scale of the gate is an option and no factor.
    nu_uz = factors.linear(config.width, config.mlp_hidden)
    nu_act = mlp.up_proj.factor / nu_uz
    mlp.up_proj.factor = change(nu_uz) * change(nu_act)
    mlp.gate_proj.factor = change(nu_uz) * gate_scale(config)


def multiply(multiplier: float) -> Change:
    """Change that multiplies a factor by a number."""
    return lambda nu: multiplier * nu


def remove(_nu: float) -> float:
    """Change that replaces a factor by 1."""
    return 1.0


def scalar_alpha(_width: int, alpha: float, scale: float) -> Residual:
    """Interpolation with one alpha for all coordinates."""
    return Residual(1, alpha, scale)


def multiply_all(multiplier: float) -> Callable[[ModelConfig], AnGPT]:
    """Constructor of an anGPT whose constant factors and nu(alpha) are multiplied by a number."""
    residual = partial(RescaledResidual, multiplier=multiplier)
    return partial(ChangedAnGPT, constants=multiply(multiplier), residual=residual)


ABLATIONS: dict[str, Callable[[ModelConfig], AnGPT]] = {
    "constant-x0.5": partial(ChangedAnGPT, constants=multiply(0.5)),
    "constant-x2": partial(ChangedAnGPT, constants=multiply(2)),
    "constant-none": partial(ChangedAnGPT, constants=remove),
    "all-x0.5": multiply_all(0.5),
    "all-x2": multiply_all(2),
    "all-none": partial(ChangedAnGPT, constants=remove, residual=BareResidual),
    "residual-none": partial(ChangedAnGPT, residual=BareResidual),
    "no-lerp": partial(ChangedAnGPT, residual=lambda *_: SumResidual()),
    "scalar-alpha": partial(ChangedAnGPT, residual=scalar_alpha),
    "strict": StrictAnGPT,
    "model-axis": ModelAxisAnGPT,
    "no-bounds": UnboundedAnGPT,
}
