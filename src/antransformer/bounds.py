"""Bounds on the norms of weight vectors: their declaration, the projection, and ``bind`` for any optimizer.

Bounds replace weight decay. After each optimizer step every bounded vector is projected into the unit ball,
w <- w / max(1, ||w||), or onto the unit sphere if the bound is strict. arXiv:2505.22014, section 4.1, states the bound
but does not print the projection. Strict bounds are those of nGPT (arXiv:2410.01131, section 2.6).

    handle = bind(model, optimizer)   # every optimizer.step() now restores the bounds
    handle.remove()                   # stops it

``normalize_(model)`` gives bounded rows to a model of plain torch modules.
"""

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from antransformer import kernels
from antransformer.nn import Embedding, Linear

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Bound:
    """Constraint on the norms of the vectors of one parameter.

    Attributes:
        name: name of the parameter in its model, for messages.
        parameter: the bounded tensor.
        axis: axis that the norm sums over; 1 bounds the rows of a weight (fan_out, fan_in).
        strict: whether norms are exactly 1 instead of at most 1.
    """

    name: str
    parameter: Tensor
    axis: int = 1
    strict: bool = False


def collect_bounds(module: nn.Module) -> list[Bound]:
    """Bounds of a module: the list of its method ``bounds()``, or else the bounds of its children.

    The bounded vectors are the rows of every ``antransformer.nn.Linear``, ``Embedding`` and ``Head``, each bias as one
    vector, and the rows of weights that ``normalize_`` has scaled.

    Raises:
        TypeError: ``bounds`` is a list of bounds and not a method, or returns something else, or a bounded weight is
            computed by a parametrization.

    >>> model = nn.Sequential(Embedding(50, 64), nn.LayerNorm(64), Linear(64, 2, bias=True))
    >>> [(bound.name, bound.axis) for bound in collect_bounds(model)]
    [('0.weight', 1), ('2.weight', 1), ('2.bias', 0)]
    """
    return list(_collect(module, ""))


def _collect(module: nn.Module, path: str) -> Iterator[Bound]:
    """Bounds of the module at a path, which is empty or ends with a dot."""
    if declares_bounds(module):
        declared = module.bounds()  # type: ignore[operator]  # a method, by declares_bounds
        for bound in declared if isinstance(declared, Iterable) else [declared]:
            if not hasattr(bound, "parameter"):  # exported models have a class of their own for bounds
                where, kind = f"{path}bounds() of {type(module).__name__}", type(bound).__name__
                raise TypeError(f"{where} must return a list of antransformer.Bound, got an entry of type {kind}")
            # Not dataclasses.replace, for the same reason.
            yield Bound(f"{path}{bound.name}", bound.parameter, bound.axis, bound.strict)
        return
    attribute = getattr(module, "bounds", None)  # may be something else, such as a submodule
    if any(isinstance(entry, Bound) for entry in (attribute if isinstance(attribute, list | tuple) else [attribute])):
        raise TypeError(f"{path}bounds of {type(module).__name__} must be a method that returns the list of bounds")
    if isinstance(module, (Embedding, Linear)) and "weight" not in module._parameters:
        where = f"{path}weight of {type(module).__name__}"
        raise TypeError(f"{where} is computed (a parametrization): bind needs a parameter")
    if isinstance(module, Embedding):
        yield Bound(f"{path}weight", module.weight)
    elif isinstance(module, Linear):
        yield Bound(f"{path}weight", module.weight)
        if module.bias is not None:
            yield Bound(f"{path}bias", module.bias, axis=0)
    elif isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Scale):
        assert isinstance(module.original, Tensor)
        yield Bound(f"{path}original", module.original)
    else:
        for name, child in module.named_children():
            yield from _collect(child, f"{path}{name}.")


def declares_bounds(module: nn.Module) -> bool:
    """Whether a module has a method ``bounds()``; a submodule or a method with other arguments is something else."""
    declared = getattr(module, "bounds", None)
    if not callable(declared) or isinstance(declared, nn.Module):
        return False
    try:
        inspect.signature(declared).bind()
    except TypeError:
        return False
    return True


def norms(bound: Bound) -> Tensor:
    """Norms of the bounded vectors in float32 (float64 for float64); the summed axis is kept with size 1."""
    weight = bound.parameter
    precision = torch.promote_types(weight.dtype, torch.float32)
    length = torch.linalg.vector_norm(weight, dim=bound.axis, keepdim=True, dtype=precision)
    placements = getattr(length, "placements", ())
    if any(placement.is_partial() for placement in placements):  # vectors are split over ranks: one all-reduce
        from torch.distributed.tensor import Replicate  # slow to import, and loaded already where DTensors exist

        length = length.redistribute(placements=[Replicate() if part.is_partial() else part for part in placements])
    norms: Tensor = length  # Any until here, since only DTensor has redistribute
    return norms


def local_rows(bound: Bound) -> Tensor | None:
    """Local shard of a matrix with bounded rows, if it is contiguous and holds complete rows; else None."""
    weight = bound.parameter.detach()
    placements = getattr(weight, "placements", ())
    complete = all(placement.is_replicate() or placement.is_shard(0) for placement in placements)
    if bound.axis != 1 or weight.ndim != 2 or not complete:
        return None
    local: Tensor = getattr(weight, "to_local", lambda: weight)()
    return local if local.is_contiguous() else None


@torch.no_grad()
def project_(bounds: Iterable[Bound]) -> None:
    """Project every bounded vector onto its constraint, in place and without a host synchronization.

    A vector inside its bound is left bit-for-bit unchanged. A zero vector stays zero, even under a strict bound.
    """
    fused: dict[tuple[Any, ...], list[Tensor]] = {}  # matrices that a kernel projects together
    for bound in bounds:
        rows = local_rows(bound)
        if rows is not None and kernels.use_triton(rows):
            fused.setdefault((bound.strict, rows.device, rows.dtype, rows.shape[1]), []).append(rows)
            continue
        length = norms(bound)
        # A zero vector has no direction, so it is divided by 1.
        length = length.masked_fill(length == 0, 1) if bound.strict else length.clamp_min(1)
        bound.parameter.div_(length)
    for (strict, *_), matrices in fused.items():
        from antransformer.kernels.bound import project_rows_

        project_rows_(matrices, strict)


def bind(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Project the bounds of a model (``collect_bounds``) after every ``optimizer.step()`` of any torch optimizer.

    Wrap, shard and cast the model before you build the optimizer and call ``bind``. Parameters that
    ``optimizer.add_param_group`` adds later are bounded too. Frozen parameters stay as they are. A copy of the
    optimizer is not bound, since torch does not copy hooks.

    Returns:
        Handle; ``handle.remove()`` stops the projection.

    Raises:
        TypeError: the arguments are not a module and an optimizer, or the model has no bounds, or its parameters are
            those of ``FullyShardedDataParallel`` (FSDP1), and as in ``collect_bounds``.
        ValueError: none of its bounded parameters is in the optimizer, or a declared bound has no parameter of the
            model or an axis that the parameter does not have.
    """
    if not isinstance(model, nn.Module) or not hasattr(optimizer, "register_step_post_hook"):
        kinds = f"({type(model).__name__}, {type(optimizer).__name__})"
        raise TypeError(
            f"bind takes a module and one optimizer, got {kinds}: call it once for each of several optimizers"
        )
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and isinstance(
        inner := getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = inner  # accelerate's wrapper is an Optimizer without the hooks of one
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in _parameters_of(optimizer)):
        raise TypeError("FullyShardedDataParallel (FSDP1) flattens weights: use fully_shard (FSDP2), which keeps rows")
    declared = collect_bounds(model)
    if not declared and not declares_bounds(model):
        raise TypeError(
            f"{type(model).__name__} has no bounds: call antransformer.normalize_(model) first, build it from "
            "antransformer.nn, or give it a method bounds() -> list[Bound]"
        )
    _check_bounds(declared, model)
    bounds, parameters = _bounds_of(optimizer, declared), _parameters_of(optimizer)
    if declared and not bounds:
        raise ValueError(
            "the optimizer has none of the model's bounded parameters: build it from model.parameters() of this model "
            "(adapters need no bind)"
        )

    # The compiler would not see in a compiled step that a parameter was frozen, unfrozen, added or replaced since.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def project(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        nonlocal bounds, parameters
        now = _parameters_of(optimizer)
        if list(map(id, now)) != list(map(id, parameters)):
            bounds, parameters = _bounds_of(optimizer, collect_bounds(model)), now
        project_(bound for bound in bounds if bound.parameter.requires_grad)

    # A hook of the optimizer works in any training loop, including the Hugging Face Trainer.
    return optimizer.register_step_post_hook(project)


def _bounds_of(optimizer: Optimizer, declared: Iterable[Bound]) -> list[Bound]:
    # By identity: an optimizer may have only some of the parameters, and knows no names.
    optimized = {id(parameter) for parameter in _parameters_of(optimizer)}
    # A tied weight once: two programs of a kernel must not project the same rows.
    found = {(id(bound.parameter), bound.axis, bound.strict): bound for bound in declared}
    return [bound for bound in found.values() if id(bound.parameter) in optimized]


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_bounds(declared: Iterable[Bound], model: nn.Module) -> None:
    known = {id(parameter) for parameter in model.parameters()}
    for bound in declared:
        weight = bound.parameter
        if id(weight) not in known:
            raise ValueError(f"the bound of {bound.name} is for a tensor that is not a parameter of the model")
        if not isinstance(bound.axis, int) or not -weight.ndim <= bound.axis < weight.ndim:
            shape = f"a parameter of shape {tuple(weight.shape)}"
            raise ValueError(f"the bound of {bound.name} must have one axis of {shape}, got {bound.axis}")


class Scale(nn.Module):
    """Parametrization that makes ``module.weight`` a constant factor times a bounded parameter."""

    factor: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", weight.detach().new_ones(1))

    def forward(self, bounded: Tensor) -> Tensor:
        """Weight of a bounded parameter."""
        return bounded * self.factor

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Bounded parameter of a weight; torch calls this when ``module.weight`` is assigned."""
        return weight / self.factor


def normalize_(module: Module) -> Module:
    """Give bounded rows to every ``nn.Linear`` and ``nn.Embedding`` of a model without changing its function.

    Each weight becomes a constant factor times a parameter whose rows have norm at most 1; ``bind`` then keeps them
    there. The factor is the smallest power of two that is at least the largest row norm. So outputs keep every bit, in
    bfloat16 too; in float16 the smallest entries can lose bits. A step on the parameter moves the weight by the factor
    times the step: tune learning rates again.

    Parameters stay the same objects, also for an existing optimizer, and tied weights stay tied. In the ``state_dict``
    a weight becomes ``parametrizations.weight.original`` and its factor; a model loads it after its own ``normalize_``.
    A second call changes nothing.

    Not changed: biases, gains of norm layers, convolutions, weights with a parametrization, modules of
    ``antransformer.nn``, and weights outside ``nn.Linear`` and ``nn.Embedding`` (such as
    ``nn.MultiheadAttention.in_proj_weight`` or transformers' ``Conv1D`` in GPT-2). Norm layers and residual sums stay,
    so the model does not become an anTransformer. Embeddings with sparse gradients are not supported.

    Returns:
        The same module, changed in place.

    Raises:
        TypeError: the argument is not a module, declares its own bounds, or has no such weight.
        ValueError: a weight has no values yet, is not finite, is too large for float16, is not floating point of
            16 bits or more, or is a parameter of another kind of module too. Nothing is changed then.

    >>> model = nn.Sequential(nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 2))
    >>> [bound.name for bound in collect_bounds(normalize_(model))]
    ['0.parametrizations.weight.original', '2.parametrizations.weight.original']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"normalize_ takes a module, got {module!r}")
    if declares_bounds(module):
        raise TypeError(f"{type(module).__name__} declares its own bounds: normalize_ is for models without bounds")
    owners: dict[nn.Parameter, list[nn.Module]] = {}  # by weight, since tied weights share a factor
    factors: dict[nn.Parameter, float] = {}
    for name, child in module.named_modules():
        supported = isinstance(child, (nn.Linear, nn.Embedding)) and not isinstance(child, Embedding)
        weight = child._parameters.get("weight")  # None if it is computed, by a parametrization or an older hook
        if supported and weight is not None:
            owners.setdefault(weight, []).append(child)
            factors[weight] = _factor(weight, f"{name}.weight")
    for name, child in module.named_modules():
        for key, parameter in child._parameters.items():
            if parameter in owners and not (key == "weight" and any(child is owner for owner in owners[parameter])):
                where = f"{name}.{key}".lstrip(".")
                raise ValueError(
                    f"{where} is also the weight of an nn.Linear or nn.Embedding, and would lose its factor"
                )
    if not owners and not collect_bounds(module):
        raise TypeError(f"{type(module).__name__} has no nn.Linear and no nn.Embedding to normalize")
    for weight, modules in owners.items():
        scale = Scale(weight)
        for owner in modules:
            parametrize.register_parametrization(owner, "weight", scale)
        with torch.no_grad():
            weight.div_(factors[weight])
            scale.factor.fill_(factors[weight])
    return module


def _factor(weight: Tensor, name: str) -> float:
    """Smallest power of two that is at least the largest row norm; dividing by it changes only exponents.

    Raises:
        ValueError: there is no such number in the dtype of the weight.
    """
    if isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
        raise ValueError(f"{name} has no values yet: initialize it first")
    if not weight.is_floating_point() or weight.itemsize == 1:
        raise ValueError(
            f"{name} must be floating point of 16 bits or more, got {weight.dtype}: quantize it afterwards"
        )
    largest = float(norms(Bound(name, weight.detach())).max()) if weight.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{name} is not finite")
    factor = 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0
    if not 0 < torch.tensor(factor, dtype=weight.dtype) < math.inf:
        raise ValueError(f"{name} has a row of norm {largest:g}, too large for a factor in {weight.dtype}")
    return factor
