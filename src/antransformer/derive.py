"""Does an architecture suit the method? The factors of any model of plain torch modules, predicted and measured.

One forward pass over given data is watched from below torch's modules, so that functional calls and sums are seen too:

    found = derive(model, batch)   # prints the table and what speaks against the method
    found.rows, found.warnings
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
from antransformer.extras import require
from antransformer.functional import normalize

RANDOM_INPUTS = 1024
RANDOM_SEED = 250522014  # no run's seed: its weights would be drawn from the same numbers as the inputs

# What the words of the warnings stand for.
CONCENTRATED = (
    0.1  # standard deviation of a norm over its mean on random inputs; n random coordinates have sqrt(1 / 2n)
)
ACCURATE = 0.1  # error of a factor on the data
SHARED = 0.25  # of the inputs' square norm, in a direction common to all
CORRELATED = 0.2  # cosine between the two sides of a residual
MASKED = 5000.0  # a score so far below the largest is a mask's
SPARSE = 0.25  # keys that a token looks at, effectively, over those that it may look at

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.addmm: 1}  # and at which place the input stands, followed by the weight
DERIVED = (aten.mul, aten._to_copy)  # a weight with a factor, or in half precision, is still that weight
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
    """One map of the model.

    Attributes:
        name: of its weight's module, or of the module that computes it.
        kind: ``linear``, ``residual``, ``attention``, or the activation's name.
        width: the smallest width that its norm has to concentrate in; of attention, the mean number of visible keys.
        predicted: the factor of the theory: ``factors.linear`` of its sizes, ``factors.activation`` at the standard
            deviation that its inputs have, ``factors.sum_residual``, ``factors.attention``.
        random: the factor that unit norm needs on random inputs; nan for attention.
        data: the same on the given data.
        random_scatter: standard deviation over mean of the output's norm, on random inputs.
        data_scatter: the same over the tokens of the data.
        correlation: of a linear map, the share of its inputs' square norm in a direction that all have in common; of a
            residual the mean cosine between its sides; of attention the share of visible keys that are effectively
            looked at; else nan.
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
        """Predicted, on random inputs, on the data."""
        return self.predicted, self.random, self.data


@dataclass(frozen=True)
class Derivation:
    """All maps in the order of their computation; ``str`` makes the table and the warnings of it."""

    rows: list[Row]

    @property
    def warnings(self) -> list[str]:
        """Where the method's assumptions fail, in sentences."""
        return [f"{row.name} ({row.kind}): {text}" for row in self.rows for text in objections(row)]

    def __str__(self) -> str:
        head = ["map", "kind", "predicted", "random", "data", "scatter, random", "scatter, data"]
        cells = [
            [row.name, row.kind, *map(_number, row.factors()), *map(_percent, (row.random_scatter, row.data_scatter))]
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(size) if place < 2 else cell.rjust(size) for place, (cell, size) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in [head, *cells])
        ]
        return "\n".join([*lines, "", *(self.warnings or ["Nothing here speaks against the method."])])


@torch.no_grad()
def derive(module: nn.Module, example_input: Any, picture: Path | str | None = None) -> Derivation:
    """Measure the factors that a model needs beside those that the theory predicts; prints the table.

    The module is watched in evaluation mode and left as it was. Weights count as scaled to unit rows (in root mean
    square), the sides of a residual as scaled to unit norm: what is measured is how norms change, not how large they
    are. Seen are products with a weight, elementwise activations, sums of two activations of the same shape (at most 3
    axes, the last of which is the width), and softmaxes over keys. Convolutions are not; an activation that is written
    out in sums and a tanh shows as these.

    Args:
        module: any, uncompiled; tokens lie on all axes but the last.
        example_input: what it is called with: a tensor, a tuple of arguments, or a mapping of named ones. Some hundred
            tokens at least, since scatter is over tokens.
        picture: a file to draw the table into, for which the extra ``plots`` is needed.

    Raises:
        ConfigError: the model does nothing that has a factor.
        MissingExtraError: a picture is asked for and matplotlib is not installed.

    >>> model = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 256, bias=False))
    >>> rows = derive(model, torch.randn(500, 256)).rows  # doctest: +ELLIPSIS
    map  kind    predicted  random   data  scatter, random  scatter, data
    0    linear      0.500 ...
    >>> [(row.kind, round(row.predicted * 2) / 2) for row in rows]
    [('linear', 0.5), ('relu', 2.5), ('linear', 2.0)]
    """
    watch = Watch(module)
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with watch.modules(), _open_attention(), watch:
            if isinstance(example_input, Mapping):
                module(**example_input)
            else:
                module(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for part, mode in training.items():
            part.training = mode
    if not watch.rows:
        raise ConfigError(
            f"{type(module).__name__} computes nothing that has a factor: no linear map, activation or sum"
        )
    found = Derivation(watch.rows)
    print(found)
    if picture is not None:
        derivation_figure(found, Path(picture))
    return found


def objections(row: Row) -> Iterator[str]:
    """What speaks against the method at one map."""
    if row.random_scatter > CONCENTRATED:
        yield (
            f"a width of {row.width} is too small: its norm scatters by {row.random_scatter:.0%} even on random "
            "inputs; put an exact norm behind it, or make it wider"
        )
    if row.kind == "attention":
        if row.correlation < SPARSE:
            yield (
                f"attention is sparse: a token looks at {row.correlation:.0%} of the {row.width} keys that it sees, so "
                f"that sqrt(keys) is {row.predicted / row.data:.1f} times what is needed; put an exact norm behind it"
            )
        return
    if row.kind == "residual":
        if abs(row.correlation) > CORRELATED:
            yield (
                f"its two sides are correlated (cosine {row.correlation:+.2f}), where its factor takes them as "
                "independent; put an exact norm before the next map"
            )
        return
    error = row.predicted / row.data - 1
    if abs(error) > ACCURATE:
        reason = "its inputs are not the random ones that the factor assumes"
        if row.correlation > SHARED:
            reason = f"its inputs are strongly correlated, {row.correlation:.0%} of their square norm in one direction"
        yield f"on the data its output is {abs(error):.0%} too {'large' if error > 0 else 'small'}: {reason}"


class Watch(TorchDispatchMode):
    """While entered, measures each map that torch computes into ``rows``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.module = module
        self.inside: list[str] = []  # names of the modules that are computing, the innermost last
        named = ((name, value) for name, value in module.named_parameters() if value.ndim == 2)
        self.weights = {value.untyped_storage().data_ptr(): name.rpartition(".")[0] for name, value in named}
        self.kept: list[Tensor] = []  # weights made on the way, so that no other tensor takes their place in memory
        self.generator = torch.Generator().manual_seed(RANDOM_SEED)

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Keeps account of which module is computing."""
        handles = []
        for name, part in self.module.named_modules():
            handles += [part.register_forward_pre_hook(self.enter(name or type(part).__name__))]
            handles += [part.register_forward_hook(self.leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str) -> Callable[..., None]:
        """A hook that notes that a module begins."""

        def hook(*_: Any) -> None:
            self.inside.append(name)

        return hook

    def leave(self, *_: Any) -> None:
        """Hook: the innermost module has ended."""
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and look at what may be one of the maps."""
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in PRODUCTS:
            x, weight = args[PRODUCTS[packet] :][:2]
            if (name := self.weight_name(weight)) is not None:
                self.linear(name, x, weight)
        elif packet in SUMS and self.is_residual(*args[:2]):
            self.residual(*args[:2])
        elif packet in ELEMENTWISE and args[0].ndim > 1:
            name = packet.__name__.rstrip("_")
            self.activation(name, lambda z: func(z, *args[1:], **kwargs), args[0].clone())
        output = func(*args, **kwargs)
        if packet in SOFTMAXES and output.ndim > 2 and args[1] % output.ndim == output.ndim - 1:
            self.attention(args[0], output)
        if packet in DERIVED and (name := self.weight_name(args[0])) is not None:
            self.weights[output.untyped_storage().data_ptr()] = name
            self.kept.append(output)
        return output

    def weight_name(self, tensor: Tensor) -> str | None:
        """Of the module whose weight this is, if it is one."""
        return self.weights.get(tensor.untyped_storage().data_ptr())

    def is_residual(self, x: Any, y: Any) -> bool:
        """Whether a sum is one of two activations: not of a position table, a bias, a mask or rotated halves."""
        both = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and 1 < x.ndim < 4
        return both and x.is_floating_point() and not isinstance(x, nn.Parameter) and not isinstance(y, nn.Parameter)

    def linear(self, name: str, x: Tensor, weight: Tensor) -> None:
        """``x`` (tokens, fan_in) times ``weight`` (fan_in, fan_out)."""
        fan_in, fan_out = weight.shape
        weight = weight.float()
        weight = weight / (weight.square().sum() / fan_out).sqrt().clamp_min(torch.finfo().tiny)
        x = normalize(x.float())
        common = float(x.mean(0).square().sum())
        random, data = ((given @ weight).norm(dim=-1) for given in (self.directions(fan_in, x), x))
        self.add(name, "linear", min(fan_in, fan_out), factors.linear(fan_in, fan_out), random, data, common)

    def activation(self, kind: str, fn: Callable[[Tensor], Tensor], z: Tensor) -> None:
        """Elementwise ``fn`` of ``z`` (..., width)."""
        z, root = z.float(), math.sqrt(z.shape[-1])
        std = float(z.square().mean().sqrt())
        if std == 0 or not math.isfinite(std):
            return
        nu = factors.activation(fn, std)
        directions = self.directions(z.shape[-1], z) * (root * std)
        random, data = (fn(given).norm(dim=-1) / root for given in (directions, z))
        self.add(self.inside[-1], kind, z.shape[-1], nu, random, data, math.nan)

    def residual(self, x: Tensor, y: Tensor) -> None:
        """``x + y``, both (..., width)."""
        x, y, width = normalize(x.float()), normalize(y.float()), x.shape[-1]
        random, data = self.directions(width, x) + self.directions(width, x), x + y
        cosine = float((x * y).sum(-1).mean())
        nu = factors.sum_residual()
        self.add(self.inside[-1], "residual", width, nu, random.norm(dim=-1), data.norm(dim=-1), cosine)

    def attention(self, scores: Tensor, share: Tensor) -> None:
        """Scores (..., T, S) of keys, and the weights that tokens give them."""
        visible = (scores > scores.amax(-1, keepdim=True) - MASKED).sum(-1)
        square = share.float().square().sum(-1)
        looking = visible > 0
        visible, square = visible[looking].float(), square[looking]
        dense = 1 / visible
        effective = float((1 / (square * visible)).mean())
        predicted = float(dense.mean().rsqrt())
        gain = (square / dense).sqrt()  # of one token over that of dense attention
        data, scatter = float(square.mean().rsqrt()), float(gain.std(correction=0) / gain.mean())
        keys = round(float(visible.mean()))
        self.put(Row(self.inside[-1], "attention", keys, predicted, math.nan, data, math.nan, scatter, effective))

    def directions(self, width: int, like: Tensor) -> Tensor:
        """Random unit vectors (RANDOM_INPUTS, width)."""
        return normalize(torch.randn(RANDOM_INPUTS, width, generator=self.generator)).to(like.device)

    def add(
        self, name: str, kind: str, width: int, predicted: float, random: Tensor, data: Tensor, correlation: float
    ) -> None:
        """A map with the norms of its outputs, where inputs have unit norm."""
        needed = [float(gain.square().mean().rsqrt()) for gain in (random, data)]
        scatter = [float(gain.std(correction=0) / gain.mean()) for gain in (random, data)]
        self.put(Row(name, kind, width, predicted, needed[0], needed[1], scatter[0], scatter[1], correlation))

    def put(self, row: Row) -> None:
        """Keep a row; one with the name and kind of another gets a number."""
        before = sum(other.kind == row.kind and other.name.partition(" #")[0] == row.name for other in self.rows)
        self.rows.append(replace(row, name=f"{row.name} #{before + 1}") if before else row)


@contextmanager
def _open_attention() -> Iterator[None]:
    """Attention and whole layers in their parts, where fused kernels would hide them."""
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
    """Draw predicted over measured factors, and how norms scatter, map by map, in the format of the path's ending.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = derivation.rows
    figure = require("matplotlib.figure", "plots").Figure(figsize=(9, 1.4 + 0.22 * len(rows)), layout="constrained")
    ratio, scatter = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    for label, marker, size in (("random", "o", 6), ("data", "s", 4)):
        ratio.plot([row.predicted / getattr(row, label) for row in rows], places, marker, ms=size, label=label)
        scatter.plot([getattr(row, f"{label}_scatter") for row in rows], places, marker, ms=size)
    ratio.axvline(1, color="gray", lw=1, ls="--")
    ratio.set(xlabel="predicted factor / needed factor", yticks=places)
    ratio.set_yticklabels([f"{row.name}, {row.kind}" for row in rows], fontsize=7)
    ratio.invert_yaxis()
    scatter.set(xlabel="scatter of the norm (deviation / mean)", xlim=(0, None))
    ratio.legend()
    for panel in (ratio, scatter):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
