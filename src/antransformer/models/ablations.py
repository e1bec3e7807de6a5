"""Ablations: anGPT with one part of the method changed or left out (arXiv:2505.22014, section 5).

They are made from outside, by exchanging factors, residual updates or bounds, so that angpt.py stays the method.
Of the constant factors only nu_uz on the gate reaches the function, the exact norms cancel the rest: wherever
nu_uz = 1/2, at the usual MLP ratio of 4, constant-x2 and constant-none are one function. The bounds do not enter the
function at all; strict, model-axis and tangent change how a model trains.
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
MakeResidual = Callable[[int, float, float], nn.Module]  # from the arguments of Residual


class RescaledResidual(Residual):
    """The interpolation with nu(alpha) multiplied by ``times``."""

    def __init__(self, width: int, alpha: float, scale: float, times: float) -> None:
        super().__init__(width, alpha, scale)
        self.times = times

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x and sublayer output y, both (..., width)."""
        return super().forward(x, y) * self.times


class BareResidual(Residual):
    """The interpolation without its factor: x + alpha (y - x)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x and sublayer output y, both (..., width)."""
        return torch.lerp(x, normalize(y).to(x.dtype), self.alpha().to(x.dtype))


class SumResidual(nn.Module):
    """The plain residual with its factor: (x + y) / sqrt(2)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x and sublayer output y, both (..., width)."""
        return (x + normalize(y)) * factors.sum_residual()


class ChangedAnGPT(AnGPT):
    """anGPT with other constant factors in its blocks, or with another residual update.

    Args:
        config: sizes and options.
        constants: from each constant factor nu to the one in its place.
        residual: makes the residual update of a sublayer.
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
    """anGPT whose bounded vectors keep norm 1, as in nGPT."""

    def bounds(self) -> list[Bound]:
        """anGPT's, strict."""
        return [replace(bound, strict=True) for bound in super().bounds()]


class ModelAxisAnGPT(AnGPT):
    """anGPT bounded along the model axis: columns of the projections into the residual stream, as in nGPT."""

    def bounds(self) -> list[Bound]:
        """anGPT's, along nGPT's axes."""
        return [replace(bound, axis=model_axis(bound.name)) for bound in super().bounds()]

    def reset_parameters(self) -> None:
        """Unit norm along the axis of each bound."""
        super().reset_parameters()
        project_(replace(bound, strict=True) for bound in self.bounds())


def change_constants(block: nn.Module, config: ModelConfig, change: Change) -> None:
    """Put ``change(nu)`` in the place of every constant factor nu of a block of anGPT.

    Two factors, nu_uz and nu_act, ride on the up projection. The gate's own scale is no factor and stays.
    """
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.mlp
    for linear in (attention.qkv_proj, attention.out_proj, mlp.down_proj):
        linear.factor = change(linear.factor)
    nu_uz = factors.linear(config.width, config.mlp_hidden)
    nu_act = mlp.up_proj.factor / nu_uz
    mlp.up_proj.factor = change(nu_uz) * change(nu_act)
    mlp.gate_proj.factor = change(nu_uz) * gate_scale(config)


def times(number: float) -> Change:
    """Every factor multiplied by a number."""
    return lambda nu: number * nu


def left_out(_nu: float) -> float:
    """1 in the place of a factor."""
    return 1.0


def scalar_alpha(_width: int, alpha: float, scale: float) -> Residual:
    """The interpolation with one alpha for all coordinates."""
    return Residual(1, alpha, scale)


def all_times(number: float) -> Callable[[ModelConfig], AnGPT]:
    """Constant factors and nu(alpha) multiplied by a number."""
    return partial(ChangedAnGPT, constants=times(number), residual=partial(RescaledResidual, times=number))


ABLATIONS: dict[str, Callable[[ModelConfig], AnGPT]] = {
    "constant-x0.5": partial(ChangedAnGPT, constants=times(0.5)),
    "constant-x2": partial(ChangedAnGPT, constants=times(2)),
    "constant-none": partial(ChangedAnGPT, constants=left_out),
    "all-x0.5": all_times(0.5),
    "all-x2": all_times(2),
    "all-none": partial(ChangedAnGPT, constants=left_out, residual=BareResidual),
    "residual-none": partial(ChangedAnGPT, residual=BareResidual),
    "no-lerp": partial(ChangedAnGPT, residual=lambda *_: SumResidual()),
    "scalar-alpha": partial(ChangedAnGPT, residual=scalar_alpha),
    "strict": StrictAnGPT,
    "model-axis": ModelAxisAnGPT,
}
