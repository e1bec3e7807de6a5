"""Check whether an architecture suits the method: predicted and measured factors of any torch model.

One forward pass is intercepted below torch's modules, so functional calls and sums are measured too:

    derivation = derive(model, batch)   # prints the table, and warnings where assumptions fail
    derivation.rows, derivation.warnings
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from antransformer import factors
from antransformer.errors import ConfigError
from antransformer.figure_style import new_figure, reference_line, save, style
from antransformer.files import FIGURE_FORMATS, check_file_target
from antransformer.functional import normalize

RANDOM_INPUTS = 1024
RANDOM_SEED = 250522014  # unlikely as a run's seed, with which weights and random inputs would be the same numbers

# Limits beyond which a row gets a warning.
MAX_SCATTER = 0.1  # standard deviation over mean of a norm on random inputs; sqrt(1 / 2n) for n random coordinates
MAX_FACTOR_ERROR = 0.1  # relative error of the predicted factor on the data
MAX_COMMON = 0.25  # fraction of the inputs' square norm in their common direction
MAX_CORRELATION = 0.2  # cosine between the two sides of a residual sum
MIN_EFFECTIVE_KEYS = 0.25  # fraction of the visible keys that a token effectively attends to

MASK_MARGIN = 5000.0  # scores this far below the largest one are masked

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.addmm: 1}  # matrix products, and the position of the input, which the weight follows
WEIGHT_COPIES = (aten.mul, aten._to_copy)  # a scaled or cast weight still counts as that weight
SUMS = (aten.add, aten.add_)
SOFTMAXES = (aten._softmax, aten._safe_softmax)
ELEMENTWISE = (
    *(aten.celu, aten.elu, aten.gelu, aten.hardsigmoid, aten.hardswish, aten.hardtanh, aten.leaky_relu, aten.mish),
    *(aten.relu, aten.sigmoid, aten.silu, aten.softplus, aten.tanh),
    *(aten.celu_, aten.elu_, aten.gelu_, aten.hardsigmoid_, aten.hardswish_, aten.hardtanh_, aten.leaky_relu_),
    *(aten.mish_, aten.relu_, aten.sigmoid_, aten.silu_, aten.tanh_),
)


@dataclass(frozen=True)
class Row:
    """Predicted and measured factors of one map of the model.

    Attributes:
        name: name of the module of the weight, or of the module that computes the map.
        kind: ``linear``, ``residual``, ``attention``, or the name of the activation.
        width: smallest width in which the norm has to concentrate; for attention, the mean number of visible keys.
        predicted: factor of the theory: ``factors.linear``, ``factors.sum_residual``, ``factors.attention``, or
            ``factors.activation`` at the standard deviation of the inputs.
        random: factor that gives unit norm on random inputs; NaN for attention.
        data: factor that gives unit norm on the data.
        random_scatter: standard deviation over mean of the output norm, on random inputs.
        data_scatter: standard deviation over mean of the output norm, over the tokens of the data.
        correlation: for a linear map, the fraction of the inputs' square norm in their common direction. For a residual
            sum, the mean cosine between its sides. For attention, the fraction of the visible keys that are effectively
            attended to. Otherwise NaN.
    """

    name: str
    kind: str
    width: int
    predicted: float
    random: float
    data: float
    random_scatter: float
    data_scatter: float
    correlation: float

    def factors(self) -> tuple[float, float, float]:
        """Factors predicted, needed on random inputs, and needed on the data."""
        return self.predicted, self.random, self.data


@dataclass(frozen=True)
class Derivation:
    """All maps in the order of their computation; ``str()`` gives the table and the warnings."""

    rows: list[Row]

    @property
    def warnings(self) -> list[str]:
        """One sentence for each failed assumption of the method."""
        return [f"{row.name} ({row.kind}): {text}" for row in self.rows for text in row_warnings(row)]

    def __str__(self) -> str:
        head = ["map", "kind", "predicted", "random", "data", "scatter, random", "scatter, data"]
        cells = [
            [row.name, row.kind, *map(_number, row.factors()), *map(_percent, (row.random_scatter, row.data_scatter))]
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in [head, *cells]
        ]
        return "\n".join(
            [*lines, "", *(self.warnings or ["No assumption of the method fails on these weights and this batch."])]
        )


@torch.no_grad()
def derive(module: nn.Module, example_input: Any, figure: Path | str | None = None) -> Derivation:
    """Compare the factors that the theory predicts for a model with those it needs, and print the table.

    The module runs once in evaluation mode and is not changed. Only changes of norms are measured, not their absolute
    size: weights are scaled to unit rows (root mean square), and the sides of a residual sum to unit norm.

    Measured are products with a weight, elementwise activations, softmaxes over keys, and sums of two activations of
    the same shape (at most 3 axes, the last of them the width). Convolutions are not measured. An activation composed
    of several operations, such as a GELU written with tanh, appears as its parts.

    Args:
        module: any model that is not compiled. Its tokens are on all axes but the last.
        example_input: tensor, tuple of arguments, or mapping of named arguments for a call of the module. Scatter is
            over tokens, so use at least a few hundred.
        figure: image file to draw the table into; needs the extra ``plots``.

    Raises:
        ConfigError: the model has no map with a factor, the input is empty or leads to NaN, or the figure cannot be
            written.
        TypeError: the first argument is not a module.
        ValueError: an activation has no factor, see ``factors.activation``.
        MissingExtraError: a figure is requested, and matplotlib is not installed.

    >>> model = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 256, bias=False))
    >>> rows = derive(model, torch.randn(500, 256)).rows  # doctest: +ELLIPSIS
    map  kind    predicted  random   data  scatter, random  scatter, data
    0    linear      0.500 ...
    >>> [(row.kind, round(row.predicted * 2) / 2) for row in rows]
    [('linear', 0.5), ('relu', 2.5), ('linear', 2.0)]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"derive takes a module, got {type(module).__name__}")
    if figure is not None:
        check_file_target("figure", Path(figure), FIGURE_FORMATS)
    tracer = Tracer(module)
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with tracer.module_names(), _decomposed_attention(), tracer:
            if isinstance(example_input, Mapping):
                module(**example_input)
            else:
                module(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for child, mode in training.items():
            child.training = mode
    if not tracer.rows:
        raise ConfigError(f"{type(module).__name__} has no map with a factor: no linear map, activation or sum")
    for row in tracer.rows:
        if math.isnan(row.data):
            raise ConfigError(f"{row.name} ({row.kind}) has no factor on this input: it is empty, or leads to NaN")
    derivation = Derivation(tracer.rows)
    print(derivation)
    if figure is not None:
        derivation_figure(derivation, Path(figure))
    return derivation


def row_warnings(row: Row) -> Iterator[str]:
    """One sentence for each assumption of the method that fails at a map."""
    if row.random_scatter > MAX_SCATTER:
        yield (
            f"width {row.width} is too small: the norm scatters by {row.random_scatter:.0%} even on random inputs; "
            "normalize the output exactly, or use a larger width"
        )
    if row.kind == "attention":
        if row.correlation < MIN_EFFECTIVE_KEYS:
            yield (
                f"attention is sparse: tokens attend to {row.correlation:.0%} of the {row.width} visible keys, so "
                f"sqrt(keys) is {row.predicted / row.data:.1f} times the factor needed; normalize the output exactly"
            )
        return
    if row.kind == "residual":
        if abs(row.correlation) > MAX_CORRELATION:
            yield (
                f"the two sides are correlated (cosine {row.correlation:+.2f}), but the factor assumes independence; "
                "normalize the sum exactly"
            )
        return
    error = row.predicted / row.data - 1
    if abs(error) > MAX_FACTOR_ERROR:
        reason = "the inputs are not random, as the factor assumes"
        if row.correlation > MAX_COMMON:
            reason = f"the inputs are correlated, with {row.correlation:.0%} of their square norm in one direction"
        yield f"on the data the output is {abs(error):.0%} too {'large' if error > 0 else 'small'}: {reason}"


class Tracer(TorchDispatchMode):
    """Dispatch mode that measures each map that torch computes, as ``rows``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.module = module
        self.running: list[str] = []  # names of the modules whose forward is running, the innermost last
        matrices = ((name, value) for name, value in module.named_parameters() if value.ndim == 2)
        self.weights = {
            value.untyped_storage().data_ptr(): name.rpartition(".")[0] or type(module).__name__
            for name, value in matrices
        }
        self.weight_copies: list[Tensor] = []  # kept alive, so that no other tensor gets their address
        self.generator = torch.Generator().manual_seed(RANDOM_SEED)

    @contextmanager
    def module_names(self) -> Iterator[None]:
        """While active, hooks keep the names of the running modules."""
        handles = []
        for name, child in self.module.named_modules():
            handles += [child.register_forward_pre_hook(self.enter(name or type(child).__name__))]
            handles += [child.register_forward_hook(self.leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str) -> Callable[..., None]:
        """Forward pre-hook of the module of this name."""

        def hook(*_: Any) -> None:
            self.running.append(name)

        return hook

    def leave(self, *_: Any) -> None:
        """Forward hook of every module."""
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and measure it if it is one of the maps."""
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in PRODUCTS:
            x, weight = args[PRODUCTS[packet] :][:2]
            if (name := self.weight_name(weight)) is not None:
                self.linear(name, x, weight)
        elif packet is aten.bmm and len(args[1]) == 1 and (name := self.weight_name(args[1])) is not None:
            self.linear(name, args[0][0], args[1][0])  # torch.einsum
        elif packet in SUMS and self.is_residual(*args[:2]):
            self.residual(*args[:2])
        elif packet in ELEMENTWISE and args[0].ndim > 1:
            name = packet.__name__.rstrip("_")
            self.activation(name, lambda z: func(z, *args[1:], **kwargs), args[0].clone())
        output = func(*args, **kwargs)
        if packet in SOFTMAXES and output.ndim > 2 and args[1] % output.ndim == output.ndim - 1:
            self.attention(args[0], output)
        if packet in WEIGHT_COPIES and (name := self.weight_name(args[0])) is not None:
            self.weights[output.untyped_storage().data_ptr()] = name
            self.weight_copies.append(output)
        return output

    def weight_name(self, tensor: Tensor) -> str | None:
        """Name of the module whose weight this is; None for any other tensor."""
        return self.weights.get(tensor.untyped_storage().data_ptr())

    def is_residual(self, x: Any, y: Any) -> bool:
        """Whether both summands are activations, not a position table, a bias, a mask or the halves of a rotation."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape or not 1 < x.ndim < 4:
            return False
        if isinstance(x, nn.Parameter) or isinstance(y, nn.Parameter) or not x.is_floating_point():
            return False
        return not bool(x.isneginf().any() or y.isneginf().any())

    def linear(self, name: str, x: Tensor, weight: Tensor) -> None:
        """Measure the product of ``x`` (tokens, fan_in) and ``weight`` (fan_in, fan_out)."""
        fan_in, fan_out = weight.shape
        weight = weight.float()
        weight = weight / (weight.square().sum() / fan_out).sqrt().clamp_min(torch.finfo().tiny)
        x = normalize(x.float())
        common = float(x.mean(0).square().sum())
        random, data = ((inputs @ weight).norm(dim=-1) for inputs in (self.directions(fan_in, x), x))
        self.add_map(name, "linear", min(fan_in, fan_out), factors.linear(fan_in, fan_out), random, data, common)

    def activation(self, kind: str, fn: Callable[[Tensor], Tensor], z: Tensor) -> None:
        """Measure the elementwise ``fn`` on ``z`` (..., width)."""
        z, root = z.float(), math.sqrt(z.shape[-1])
        std = float(z.square().mean().sqrt())
        if std == 0 or not math.isfinite(std):
            return
        nu = factors.activation(fn, std)
        directions = self.directions(z.shape[-1], z) * (root * std)
        random, data = (fn(inputs).norm(dim=-1) / root for inputs in (directions, z))
        self.add_map(self.running[-1], kind, z.shape[-1], nu, random, data, math.nan)

    def residual(self, x: Tensor, y: Tensor) -> None:
        """Measure ``x + y``, both (..., width)."""
        x, y, width = normalize(x.float()), normalize(y.float()), x.shape[-1]
        random, data = self.directions(width, x) + self.directions(width, x), x + y
        cosine = float((x * y).sum(-1).mean())
        nu = factors.sum_residual()
        self.add_map(self.running[-1], "residual", width, nu, random.norm(dim=-1), data.norm(dim=-1), cosine)

    def attention(self, scores: Tensor, weights: Tensor) -> None:
        """Measure attention with scores and softmax weights (..., T, S)."""
        visible = (scores > scores.amax(-1, keepdim=True) - MASK_MARGIN).sum(-1)
        square = weights.float().square().sum(-1)  # square norm of an average of independent unit vectors
        unmasked = visible > 0
        visible, square = visible[unmasked].float(), square[unmasked]
        dense = 1 / visible
        effective = float((1 / (square * visible)).mean())
        predicted = float(dense.mean().rsqrt())
        gain = (square / dense).sqrt()  # norm of each token's output, relative to uniform attention
        data, scatter = float(square.mean().rsqrt()), float(gain.std(correction=0) / gain.mean())
        keys = round(float(visible.mean()))
        self.add_row(Row(self.running[-1], "attention", keys, predicted, math.nan, data, math.nan, scatter, effective))

    def directions(self, width: int, x: Tensor) -> Tensor:
        """Random unit vectors (RANDOM_INPUTS, width) on the device of x."""
        return normalize(torch.randn(RANDOM_INPUTS, width, generator=self.generator)).to(x.device)

    def add_map(
        self, name: str, kind: str, width: int, predicted: float, random: Tensor, data: Tensor, correlation: float
    ) -> None:
        """Add a map with its output norms for inputs of unit norm, on random inputs and on the data."""
        needed = [float(gain.square().mean().rsqrt()) for gain in (random, data)]
        scatter = [float(gain.std(correction=0) / gain.mean()) for gain in (random, data)]
        self.add_row(Row(name, kind, width, predicted, needed[0], needed[1], scatter[0], scatter[1], correlation))

    def add_row(self, row: Row) -> None:
        """Add a row; a number tells it from earlier rows with the same name and kind."""
        before = sum(other.kind == row.kind and other.name.partition(" #")[0] == row.name for other in self.rows)
        self.rows.append(replace(row, name=f"{row.name} #{before + 1}") if before else row)


@contextmanager
def _decomposed_attention() -> Iterator[None]:
    """While active, attention and transformer layers run as single operations instead of fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def derivation_figure(derivation: Derivation, path: Path) -> None:
    """Plot predicted over needed factors and the scatter of norms for each map; the suffix gives the file format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = derivation.rows
    with style(extra="plots"):
        figure, (ratio, scatter) = new_figure(1, 2, height=1.6 + 0.2 * len(rows), width=9.4)
        positions = range(len(rows))
        for label, title, marker in (("random", "random inputs", "o"), ("data", "data", "s")):
            ratio.plot([row.predicted / getattr(row, label) for row in rows], positions, marker, label=title)
            scatter.plot([getattr(row, f"{label}_scatter") for row in rows], positions, marker, label=title)
        reference_line(ratio, 1, "x")
        ratio.set(xlabel="predicted factor / needed factor", yticks=positions)
        ratio.set_yticklabels([f"{row.name} ({row.kind})" for row in rows], fontsize=7)
        ratio.set_ylim(len(rows) - 0.4, -0.6)
        scatter.set(xlabel="scatter of the norm (standard deviation / mean)")
        right = scatter.get_xlim()[1]
        scatter.set_xlim(-right / 40, right)  # a scatter of 0 is not cut by the frame
        figure.legend(*ratio.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        save(figure, path)
