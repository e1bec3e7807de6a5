"""Accumulators and forward hooks for measuring a model batch by batch."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from antransformer.diagnostics.diagnosis import Spread


class Moments:
    """Running mean, root mean square and standard deviation of values added in batches."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Add values of any shape; the sums are kept in float64."""
        values = values.cpu().double()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    def rms(self) -> float:
        """Root mean square of all values."""
        return math.sqrt(self.squares / self.count)

    def spread(self) -> Spread:
        """Mean and standard deviation of all values."""
        mean = self.total / self.count
        # Rounding can make the variance of equal values slightly negative.
        return Spread(mean, math.sqrt(max(0.0, self.squares / self.count - mean**2)))


MomentsByLayer = defaultdict[tuple[str, int], Moments]  # keys: name of the quantity, index of the layer


class Call(NamedTuple):
    """Inputs and output of the last call of a module."""

    inputs: tuple[Any, ...]
    output: Any


@contextmanager
def record(blocks: Iterable[nn.Module]) -> Iterator[dict[str, Call]]:
    """Record the last call of each module inside the blocks while the context is active.

    Keys are module names relative to their block, "" for the block itself. Modules of different blocks share a key, so
    clear the dictionary after each block.
    """
    calls: dict[str, Call] = {}

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] = Call(inputs, output)

        return hook

    modules = [item for block in blocks for item in block.named_modules()]
    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
