"""Law files for planning, as ``antransformer fit --json`` writes them: the user's own, and those that are shipped.

A shipped file states its source in ``measured``. To ship another one, add that key to the JSON of ``fit`` and put the
file into ``laws/``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from antransformer.errors import ConfigError, DataError
from antransformer.files import read_json
from antransformer.reporting.labels import format_count
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, PowerLaw, Surface
from antransformer.scaling.intervals import Interval, Matrix
from antransformer.training.config import normalize_settings

SHIPPED = Path(__file__).parent.parent / "laws"
POWER_LAWS = ("size", "loss", "batch", "lr")  # read by a plan; a file may hold others
LAW_TRAINING = ("optimizer", "schedule", "decay_fraction", "min_lr_ratio", "ema", "document_mask")  # also of the plan
MARGIN = 1.005  # a value this far outside a range, and no further, is taken for a rounded end of it
MAX_EXPONENT = 700.0  # of e; a float overflows at 710


@dataclass(frozen=True)
class Laws:
    """Laws of one architecture.

    Attributes:
        powers: power laws by name, some of ``POWER_LAWS``.
        rounding: largest errors of the loss law's coefficient and exponent, where these were printed with few digits.
        surface: L(N, D).
        horizon: exponent of the best learning rate over steps, and the tokens per parameter at which its law over N
            holds; None if unknown.
        training: settings that the law of the learning rate was measured with, some of ``LAW_TRAINING``.
        is_surface_determined: whether the runs determined the five coefficients of L(N, D).
    """

    powers: dict[str, PowerLaw]
    rounding: tuple[float, float] | None
    surface: Surface | None
    horizon: tuple[float, float] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    is_surface_determined: bool = True

    @property
    def size_surface(self) -> Surface | None:
        """L(N, D) if it may choose the model size, which an undetermined one may not."""
        return self.surface if self.is_surface_determined else None

    @property
    def compute(self) -> Interval | None:
        """Range of 6 N D in which the best size is known; None without a law of it."""
        if surface := self.size_surface:
            low, high = zip(surface.sizes, surface.tokens, strict=True)
            return FLOPS_PER_PARAMETER * math.prod(low), FLOPS_PER_PARAMETER * math.prod(high)
        return self.powers["size"].span if "size" in self.powers else None

    def best_size(self, compute: float) -> float:
        """Number of parameters with the lowest loss for 6 N D; needs a law, so ``self.compute`` must not be None."""
        surface = self.size_surface
        return float(surface.best_size(compute) if surface else self.powers["size"](compute))


@dataclass(frozen=True)
class LawFile:
    """Content of one law file.

    Attributes:
        name: file name.
        measured: source of a shipped file: by whom and on which data; None in a user's file.
        by_architecture: laws of each architecture.
    """

    name: str
    measured: str | None
    by_architecture: dict[str, Laws]


@dataclass(frozen=True)
class Prediction:
    """Loss in nats per token, on the text that the law was measured on.

    Attributes:
        loss: predicted value.
        low, high: ends of the band; 0 and infinity if unknown.
        band: kind of band.
        law: name of the law.
        extrapolations: one note for each quantity that is outside the measured range.
    """

    loss: float
    low: float
    high: float
    band: str
    law: str
    extrapolations: tuple[str, ...]


def predict(laws: Laws, parameters: float, tokens: float) -> Prediction | None:
    """Predict the loss by L(N, D), or else by L(C), which assumes the best size; None without either law."""
    compute = float(FLOPS_PER_PARAMETER) * parameters * tokens
    if surface := laws.surface:
        loss, (low, high) = surface(parameters, tokens), surface.band(parameters, tokens)
        notes = (
            extrapolation_note("parameters", parameters, surface.sizes),
            extrapolation_note("tokens", tokens, surface.tokens),
        )
        return Prediction(loss, float(low), float(high), "95%", "L(N, D)", tuple(filter(None, notes)))
    if law := laws.powers.get("loss"):
        loss, (low, high), band = law(compute), law.band(compute), "95%"
        if laws.rounding:
            # Of log loss: the relative error of the coefficient, and the error of the exponent times log C.
            error = laws.rounding[0] / law.coefficient + laws.rounding[1] * math.log(compute)
            factor = math.exp(min(error, MAX_EXPONENT))
            low, high, band = loss / factor, loss * factor, "rounding only"
        note = extrapolation_note("compute", compute, law.span)
        return Prediction(loss, float(low), float(high), band, "L(C)", (note,) if note else ())
    return None


def extrapolation_note(name: str, value: float, span: Interval) -> str | None:
    """Note of how far a value is outside a range; None inside."""
    low, high = span
    quantity = f"{name} {format_quantity(value)}"
    if value > high * MARGIN:
        return f"{quantity} is a factor of {value / high:.3g} above the largest measured, {format_quantity(high)}"
    if value < low / MARGIN:
        return f"{quantity} is a factor of {low / value:.3g} below the smallest measured, {format_quantity(low)}"
    return None


def format_quantity(value: float) -> str:
    """Format parameters, tokens or FLOPs: 25.3M, 1.2T, and 1e+15 and above in scientific notation."""
    return f"{value:.2g}" if value >= 1e15 else format_count(float(f"{value:.3g}"))


def nearest_shipped(architecture: str, compute: float | None) -> LawFile | None:
    """Shipped laws of the architecture whose measured range is nearest to the compute; None without any."""
    files = [file for file in map(read_laws, sorted(SHIPPED.glob("*.json"))) if architecture in file.by_architecture]

    def distance(file: LawFile) -> float:
        span = file.by_architecture[architecture].compute
        if span is None or compute is None:
            return math.inf
        return max(math.log(span[0] / compute), math.log(compute / span[1]), 0.0)

    return min(files, key=distance, default=None)


def read_laws(path: Path) -> LawFile:
    """Read a file that ``antransformer fit --json`` wrote.

    Raises:
        DataError: the file cannot be read, or holds no laws.
    """
    try:
        content = read_json(path)
        measured = content.pop("measured", None)
        by_architecture = {str(name): _laws(entry) for name, entry in content.items()}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not a file of laws from antransformer fit --json ({error!r})") from None
    if not by_architecture:
        raise DataError(f"{path}: the file holds no laws")
    return LawFile(path.name, None if measured is None else str(measured), by_architecture)


def _laws(content: Mapping[str, Any]) -> Laws:
    powers = {name: _power_law(content[name]) for name in POWER_LAWS if content.get(name)}
    rounding = content["loss"].get("rounded") if "loss" in powers else None
    surface = _surface(content["surface"]) if content.get("surface") else None
    horizon = content.get("horizon")
    return Laws(
        powers,
        _rounding(*rounding) if rounding else None,
        surface,
        (_exponent(horizon["exponent"]), _positive(horizon["tokens_per_parameter"])) if horizon else None,
        _training(content),
        # Files of published laws have no covariance.
        not surface or not content["surface"].get("covariance") or all(map(math.isfinite, sum(surface.covariance, ()))),
    )


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    # Files of an earlier release have the optimizer only.
    settings = content.get("training") or {name: content[name] for name in ("optimizer",) if content.get(name)}
    if unknown := settings.keys() - LAW_TRAINING:
        raise ValueError(f"training cannot have {', '.join(sorted(map(str, unknown)))}")
    return normalize_settings(settings, "training")


def _rounding(coefficient: Any, exponent: Any) -> Interval:
    """Both errors as numbers; a list of another length raises TypeError in the call."""
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
        alpha=_exponent(content["alpha"], minimum=1e-3),
        beta=_exponent(content["beta"], minimum=1e-3),
        points=int(content["points"]),
        error=_number(content["error"]),
        sizes=_span(content["sizes"]),
        tokens=_span(content["tokens"]),
        covariance=_covariance(content.get("covariance"), 5),
        delta={},
        bootstrap={},
    )


def _covariance(rows: Any, size: int) -> Matrix:
    """Square matrix, in which null entries, or all if there are no rows, are infinite."""
    if rows is None:
        return ((math.inf,) * size,) * size
    matrix = tuple(tuple(math.inf if value is None else _number(value) for value in row) for row in rows)
    if [len(row) for row in matrix] != [size] * size:
        raise ValueError(f"the covariance must be {size} by {size}")
    return matrix


def _span(ends: Any) -> Interval:
    low, high = map(_positive, ends)
    if low > high:
        raise ValueError(f"the range must ascend, got {low:g} to {high:g}")
    return low, high


def _positive(value: Any) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError(f"expected a positive number, got {number:g}")
    return number


def _exponent(value: Any, minimum: float = -5.0) -> float:
    if not minimum < _number(value) < 5:
        raise ValueError(f"expected an exponent between {minimum:g} and 5, got {value}")
    return float(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f"expected a number below 1e30, got {str(value)[:20]}")
    return float(value)
