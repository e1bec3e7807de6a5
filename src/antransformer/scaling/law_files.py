"""Scaling laws to plan with, as ``antransformer fit --json`` writes them: the user's own, or those that are shipped.

A shipped file says in ``measured`` where and on what; to ship another, put ``fit``'s JSON with that key into ``laws/``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antransformer.errors import DataError
from antransformer.files import read_json
from antransformer.reporting.labels import format_count
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, Interval, PowerLaw, Surface

SHIPPED = Path(__file__).parent.parent / "laws"
FOUND_OF = {"size": "C", "loss": "C", "batch": "N", "lr": "N"}  # the power laws that a plan uses, and of what they are


@dataclass(frozen=True)
class Laws:
    """Those of one architecture.

    Attributes:
        powers: some of ``FOUND_OF``.
        rounded: how far the printed coefficient and exponent of the loss may be from those that were fitted.
        surface: L(N, D).
    """

    powers: dict[str, PowerLaw]
    rounded: tuple[float, float] | None
    surface: Surface | None

    @property
    def compute(self) -> Interval | None:
        """The range of 6 N D that the best size is known for."""
        if self.surface:
            low, high = zip(self.surface.sizes, self.surface.tokens, strict=True)
            return FLOPS_PER_PARAMETER * math.prod(low), FLOPS_PER_PARAMETER * math.prod(high)
        return self.powers["size"].span if "size" in self.powers else None

    def best_size(self, compute: float) -> float:
        """Parameters of the lowest loss for 6 N D; there is a law of it where ``compute`` is not None."""
        return float(self.surface.best_size(compute) if self.surface else self.powers["size"](compute))


@dataclass(frozen=True)
class LawFile:
    """What one file holds.

    Attributes:
        name: of the file.
        measured: where and on what; None in a user's.
        of: laws by architecture.
    """

    name: str
    measured: str | None
    of: dict[str, Laws]


@dataclass(frozen=True)
class Prediction:
    """A loss in nats per token on the text that its law was measured on.

    Attributes:
        loss: the law's.
        low, high: its band; 0 and infinite where none is known.
        band: what the band is.
        law: which.
        outside: how far the question lies outside of what was measured, one line a quantity.
    """

    loss: float
    low: float
    high: float
    band: str
    law: str
    outside: tuple[str, ...]


def predict(laws: Laws, parameters: float, tokens: float) -> Prediction | None:
    """The loss by L(N, D), or else by L(C), which supposes the best size; None without either."""
    compute = float(FLOPS_PER_PARAMETER) * parameters * tokens
    if surface := laws.surface:
        loss, (low, high) = surface(parameters, tokens), surface.band(parameters, tokens)
        far = outside("parameters", parameters, surface.sizes), outside("tokens", tokens, surface.tokens)
        return Prediction(loss, float(low), float(high), "95%", "L(N, D)", tuple(filter(None, far)))
    if law := laws.powers.get("loss"):
        loss, (low, high), band = law(compute), law.band(compute), "95%"
        if laws.rounded:
            off = laws.rounded[0] / law.coefficient + laws.rounded[1] * math.log(compute)
            wide = math.exp(min(off, 700.0))  # beyond it there is no number
            low, high, band = loss / wide, loss * wide, "by rounding alone"
        said = outside("compute", compute, law.span)
        return Prediction(loss, float(low), float(high), band, "L(C)", (said,) if said else ())
    return None


def outside(name: str, value: float, span: Interval) -> str | None:
    """How far a value lies outside of a range, in words, or None."""
    low, high = span
    if value > high * 1.005:
        return f"{name} {shown(value)} is {value / high:.3g} times the largest measured, {shown(high)}"
    if value < low / 1.005:
        return f"{name} {shown(value)} is {low / value:.3g} times below the smallest measured, {shown(low)}"
    return None


def shown(value: float) -> str:
    """A count of parameters or tokens, or a compute, which is larger than either."""
    if value >= 1e15:
        return f"{value:.2g}"
    return f"{value / 1e12:.3g}T" if value >= 1e12 else format_count(float(f"{value:.3g}"))


def nearest_shipped(architecture: str, compute: float | None) -> LawFile | None:
    """The shipped laws of the architecture that were measured nearest to the compute; None where there are none."""
    files = [file for file in map(read_laws, sorted(SHIPPED.glob("*.json"))) if architecture in file.of]

    def distance(file: LawFile) -> float:
        span = file.of[architecture].compute
        if span is None or compute is None:
            return math.inf
        return max(math.log(span[0] / compute), math.log(compute / span[1]), 0.0)

    return min(files, key=distance, default=None)


def read_laws(path: Path) -> LawFile:
    """What ``antransformer fit --json`` wrote.

    Raises:
        DataError: it can not be read, or holds no laws.
    """
    try:
        content = read_json(path)
        measured = content.pop("measured", None)
        of = {str(name): _laws(laws) for name, laws in content.items()}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: no laws as antransformer fit --json writes them ({error!r})") from None
    if not of:
        raise DataError(f"{path}: no laws in it")
    return LawFile(path.name, None if measured is None else str(measured), of)


def _laws(content: Mapping[str, Any]) -> Laws:
    powers = {name: _power_law(content[name]) for name in FOUND_OF if content.get(name)}
    rounded = content["loss"].get("rounded") if "loss" in powers else None
    surface = _surface(content["surface"]) if content.get("surface") else None
    return Laws(powers, _rounded(*rounded) if rounded else None, surface)


def _rounded(coefficient: Any, exponent: Any) -> Interval:
    """A list of another length raises ``TypeError`` in the call."""
    return _number(coefficient), _number(exponent)


def _power_law(content: Mapping[str, Any]) -> PowerLaw:
    return PowerLaw(
        coefficient=_positive(content["coefficient"]),
        exponent=_exponent(content["exponent"]),
        r2=math.nan,
        points=int(content.get("points", 0)),
        span=_span(content["span"]),
        covariance=_covariance(content.get("covariance"), 2),
        delta={},
        bootstrap={},
    )


def _surface(content: Mapping[str, Any]) -> Surface:
    return Surface(
        E=_number(content["E"]),
        A=_positive(content["A"]),
        B=_positive(content["B"]),
        alpha=_exponent(content["alpha"], above=1e-3),
        beta=_exponent(content["beta"], above=1e-3),
        points=int(content["points"]),
        error=_number(content["error"]),
        sizes=_span(content["sizes"]),
        tokens=_span(content["tokens"]),
        covariance=_covariance(content.get("covariance"), 5),
        delta={},
        bootstrap={},
    )


def _covariance(rows: Any, size: int) -> tuple[tuple[float, ...], ...]:
    """What is null, or not there, is infinite."""
    if rows is None:
        return ((math.inf,) * size,) * size
    matrix = tuple(tuple(math.inf if value is None else _number(value) for value in row) for row in rows)
    if [len(row) for row in matrix] != [size] * size:
        raise ValueError(f"a covariance that is not {size} by {size}")
    return matrix


def _span(ends: Any) -> Interval:
    low, high = map(_positive, ends)
    if low > high:
        raise ValueError("a range that ends before it begins")
    return low, high


def _positive(value: Any) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError(f"{number} where a positive number belongs")
    return number


def _exponent(value: Any, above: float = -5.0) -> float:
    if not above < _number(value) < 5:
        raise ValueError(f"{value} where an exponent belongs")
    return float(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f"{str(value)[:20]} where a number belongs")
    return float(value)
