"""Bounds on weight vectors: which parameter, along which axis, strict or not, and how they are kept.

The bound takes the place of weight decay: after each optimizer step every bounded vector is projected back into the
unit ball, w <- w / max(1, ||w||), or, where strict, onto the unit sphere (arXiv:2505.22014, section 4.1; the projection
is the natural reading, the paper does not print it; strict norms are nGPT's, arXiv:2410.01131, section 2.6).

    handle = bind(model, optimizer)   # from here on every optimizer.step() keeps the bounds
    handle.remove()                   # until here

``normalize_(model)`` gives bounded rows to a model that was not built with them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from antransformer import kernels
from antransformer.nn import Embedding, Linear


@dataclass(frozen=True)
class Bound:
    """A constraint on the vectors of one parameter.

    Attributes:
        name: the parameter's name in its model, for messages.
        parameter: the tensor itself.
        axis: the axis that the norm sums over; 1 bounds the rows of a (fan_out, fan_in) weight, its neurons' inputs.
        strict: norm = 1 if true, norm <= 1 otherwise.
    """

    name: str
    parameter: Tensor
    axis: int = 1
    strict: bool = False


def collect_bounds(module: nn.Module) -> list[Bound]:
    """The bounds of a module: those that its method ``bounds()`` lists, or else those of the modules in it.

    The rows of every ``antransformer.nn.Linear``, ``Embedding`` and ``Head`` are bounded, and a bias as one vector, and
    so are the rows of what ``normalize_`` has scaled.

    >>> model = nn.Sequential(Embedding(50, 64), nn.LayerNorm(64), Linear(64, 2, bias=True))
    >>> [(bound.name, bound.axis) for bound in collect_bounds(model)]
    [('0.weight', 1), ('2.weight', 1), ('2.bias', 0)]
    """
    declared = getattr(module, "bounds", None)
    if callable(declared):
        return declared()
    if isinstance(module, Embedding):
        return [Bound("weight", module.weight)]
    if isinstance(module, Linear):
        bias = [] if module.bias is None else [Bound("bias", module.bias, axis=0)]
        return [Bound("weight", module.weight), *bias]
    if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Scale):
        assert isinstance(module.original, Tensor)
        return [Bound("original", module.original)]
    parts = [(name, bound) for name, child in module.named_children() for bound in collect_bounds(child)]
    return [replace(bound, name=f"{name}.{bound.name}") for name, bound in parts]


def norms(bound: Bound) -> Tensor:
    """Norms of the bounded vectors in float32 (float64 for float64), with the summed axis kept at size 1."""
    weight = bound.parameter
    precision = torch.promote_types(weight.dtype, torch.float32)
    length = torch.linalg.vector_norm(weight, dim=bound.axis, keepdim=True, dtype=precision)
    placements = getattr(length, "placements", ())
    if any(placement.is_partial() for placement in placements):  # vectors lie in parts on several ranks: one message
        from torch.distributed.tensor import Replicate  # which takes a second, and is there where such a tensor is

        length = length.redistribute(placements=[Replicate() if part.is_partial() else part for part in placements])
    return length


def whole_rows(bound: Bound) -> Tensor | None:
    """This process's part of a matrix whose rows are bounded, where rows are whole in it; else None."""
    weight = bound.parameter.detach()
    placements = getattr(weight, "placements", ())
    if bound.axis != 1 or weight.ndim != 2 or any(not (it.is_replicate() or it.is_shard(0)) for it in placements):
        return None
    local: Tensor = getattr(weight, "to_local", lambda: weight)()
    return local if local.is_contiguous() else None


@torch.no_grad()
def project_(bounds: Iterable[Bound]) -> None:
    """Put every bounded vector back where it belongs, in place and without a host synchronization.

    A vector inside its bound keeps every bit; a zero vector stays zero, under a strict bound too.
    """
    for bound in bounds:
        rows = whole_rows(bound)
        if rows is not None and kernels.use_triton(rows):
            from antransformer.kernels.bound import project_rows_

            project_rows_(rows, bound.strict)
            continue
        length = norms(bound)
        length = length.masked_fill(length == 0, 1) if bound.strict else length.clamp_min(1)
        bound.parameter.div_(length)


def bind(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Keep the model's bounds (``of``) after every ``optimizer.step()``, of any torch optimizer.

    The bounds are read now: wrap, shard or cast the model first, as for building the optimizer.

    Returns:
        A handle; ``handle.remove()`` releases the optimizer.

    Raises:
        TypeError: the model has no bounds.
        ValueError: none of its bounded parameters is in the optimizer.
    """
    listed = collect_bounds(model)
    if not listed and not hasattr(model, "bounds"):
        raise TypeError(
            f"{type(model).__name__} lists no bounds: build it from antransformer.nn, or give it a method "
            "bounds() -> list[Bound]"
        )
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    bounds = [bound for bound in listed if id(bound.parameter) in stepped]
    if listed and not bounds:
        raise ValueError("the optimizer steps none of the model's bounded parameters: build it from this model's")

    def keep(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        project_(bounds)

    return optimizer.register_step_post_hook(keep)


class Scale(nn.Module):
    """A constant factor on a weight, as a parametrization: ``module.weight`` is factor * its bounded parameter."""

    factor: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", like.detach().new_ones(1))

    def forward(self, bounded: Tensor) -> Tensor:
        """The weight."""
        return bounded * self.factor

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter of a weight that is assigned."""
        return weight / self.factor


def normalize_(module: nn.Module) -> nn.Module:
    """Give bounded rows to every ``nn.Linear`` and ``nn.Embedding`` in a model, whose function stays the same.

    Each weight becomes a constant factor times a parameter with rows of norm at most 1, where ``bind`` then keeps them.
    The factor is one number a weight, the lowest power of two that is not below its largest row norm: outputs keep
    every bit, in half precision too. A step of a given length on the parameter moves the weight by the factor times
    that: learning rates are to be tuned anew.

    The parameters stay the same objects, also for an optimizer that was made before, and tied weights stay tied. In the
    ``state_dict`` a weight is ``parametrizations.weight.original`` with its factor beside it, which a model loads that
    went through ``normalize_`` itself. Calling it again changes nothing.

    Left as they are: biases, gains of norm layers, convolutions and whatever holds a weight by other means
    (``nn.MultiheadAttention.in_proj_weight``, transformers' ``Conv1D`` in GPT-2), weights with a parametrization of
    their own, and what is made of ``antransformer.nn``. Where norms lie and how residuals add up is not changed: this
    bounds the weights, and makes no anTransformer of the model. Embeddings with sparse gradients are not supported.

    Returns:
        The module, changed in place.

    Raises:
        TypeError: it lists its bounds by itself, or has no such weight.
        ValueError: a weight is not finite; nothing is changed then.

    >>> model = nn.Sequential(nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 2))
    >>> [bound.name for bound in collect_bounds(normalize_(model))]
    ['0.parametrizations.weight.original', '2.parametrizations.weight.original']
    """
    if hasattr(module, "bounds"):
        raise TypeError(f"{type(module).__name__} lists its bounds by itself: normalize_ is for models without")
    found: dict[nn.Parameter, list[nn.Module]] = {}  # tied weights have one factor
    factors: dict[nn.Parameter, float] = {}
    for name, part in module.named_modules():
        plain = isinstance(part, (nn.Linear, nn.Embedding)) and not isinstance(part, Embedding)
        if plain and not parametrize.is_parametrized(part, "weight"):
            weight = part.weight
            largest = float(norms(Bound(name, weight.detach())).max())
            if not math.isfinite(largest):
                raise ValueError(f"{name}.weight is not finite")
            found.setdefault(weight, []).append(part)
            factors[weight] = 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0
    if not found and not collect_bounds(module):
        raise TypeError(f"{type(module).__name__} has no nn.Linear and no nn.Embedding to normalize")
    for weight, parts in found.items():
        scale = Scale(weight)
        for part in parts:
            parametrize.register_parametrization(part, "weight", scale)
        with torch.no_grad():
            weight.div_(factors[weight])
            scale.factor.fill_(factors[weight])
    return module
