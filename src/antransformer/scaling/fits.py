"""All scaling laws of each architecture from observed runs, with notes on what the runs leave undetermined."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from antransformer.errors import DataError
from antransformer.reporting.labels import format_count
from antransformer.results.observations import BestSettings, Observation, Observations, column
from antransformer.results.records import nonfinite_as_null
from antransformer.scaling import fitting as scaling
from antransformer.scaling.fitting import Frontier, Horizon, Optimum, PowerLaw, Surface, power_law
from antransformer.scaling.intervals import Array
from antransformer.scaling.law_files import LAW_TRAINING
from antransformer.wording import counted

MIN_POINTS = 2  # of a power law
FEW_POINTS = 5  # below which a note warns of a wide interval
SURFACE_MINIMUM = (6, 3, 3)  # runs, sizes and token counts of L(N, D), which has five coefficients
MAX_RATIO_SPREAD = 1.5  # between the most and the fewest tokens per parameter of laws over N
# Title and variable of each power law: N is the number of parameters, C the compute.
LAWS = {
    "batch": ("best batch", "N"),
    "lr": ("best learning rate", "N"),
    "loss": ("loss", "C"),
    "size": ("best size", "C"),
    "tokens": ("best tokens", "C"),
}


@dataclass(frozen=True)
class SizeOptimum:
    """Best settings for one size and number of tokens; ``tokens`` is NaN if unknown."""

    parameters: float
    tokens: float
    best: Optimum

    @property
    def known_batch(self) -> bool:
        """Whether the best batch is a minimum and not only an edge of the range that was tried."""
        return self.best.lr_bracketed and self.best.batch_bracketed

    @property
    def known_lr(self) -> bool:
        """Whether the best learning rate is a minimum, given the best batch or the only batch."""
        return self.best.lr_bracketed and (self.best.batch_bracketed or self.best.batches == 1)


@dataclass(frozen=True)
class Fit:
    """All laws of one architecture.

    Attributes:
        name: architecture.
        runs: for each size and number of tokens the lowest finite loss, averaged over seeds.
        optima: best settings, by size and then by tokens.
        frontier: runs on the compute frontier; None without runs.
        laws: power laws by their name in ``LAWS``; laws without enough points are left out.
        horizon: best learning rate over the steps of a run; None if no size has two lengths.
        surface: L(N, D); None if there are too few runs.
        notes: warnings about missing laws and laws from few points.
        searches: runs among which the best settings were searched, of all architectures, for the figures.
        training: settings of the runs, which the law of the learning rate is for; without those that are not recorded.
    """

    name: str
    runs: tuple[Observation, ...]
    optima: tuple[SizeOptimum, ...]
    frontier: Frontier | None
    laws: dict[str, PowerLaw]
    horizon: Horizon | None
    surface: Surface | None
    notes: tuple[str, ...]
    searches: tuple[Observation, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Values for JSON: the laws by name, then optima, frontier, surface and notes; NaN and infinity become null."""
        values: dict[str, Any] = {name: asdict(law) for name, law in self.laws.items()}
        training = {name: self.training[name] for name in LAW_TRAINING if self.training.get(name) is not None}
        if training:
            values["training"] = training
        values["optima"] = [asdict(optimum) for optimum in self.optima]
        if self.frontier:
            columns = {name: column.tolist() for name, column in asdict(self.frontier).items()}
            values["frontier"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if self.horizon:
            values["horizon"] = asdict(self.horizon)
        if self.surface:
            values["surface"] = asdict(self.surface)
        json_values: dict[str, Any] = nonfinite_as_null({**values, "notes": self.notes})
        return json_values


def fit_optima(rows: Sequence[BestSettings]) -> list[Fit]:
    """Fit the laws of batch and learning rate to best settings that are already known.

    Raises:
        DataError: no architecture has two sizes.
    """
    _require_two_points(rows)
    fits = []
    for name in dict.fromkeys(row.architecture for row in rows):
        own_rows = sorted((row for row in rows if row.architecture == name), key=lambda row: row.parameters)
        optima = [
            SizeOptimum(row.parameters, math.nan, Optimum(row.batch, row.lr, math.nan, True, True, 3))
            for row in own_rows
        ]
        laws, notes = _laws_of_size(optima, None)
        fits.append(Fit(name, (), tuple(optima), None, laws, None, None, tuple(notes)))
    return fits


def fit(observed: Observations, bins: int | None = None) -> list[Fit]:
    """Fit all laws of each architecture.

    Args:
        observed: searches and finished runs.
        bins: number of bins of compute (default: four per decade).

    Raises:
        DataError: no architecture has two sizes, or two lengths of the runs.
    """
    rows = (*observed.searches, *observed.runs)
    _require_two_points(rows)
    names = dict.fromkeys(row.architecture for row in rows)
    return [
        replace(
            _fit_architecture(name, observed, bins),
            searches=observed.searches,
            training=observed.training.get(name, {}),
        )
        for name in names
    ]


def _require_two_points(rows: Sequence[Observation | BestSettings]) -> None:
    points: dict[str, set[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.architecture, set()).add((row.parameters, getattr(row, "tokens", 0)))
    if max(map(len, points.values())) < MIN_POINTS:
        raise DataError(
            f"each of {', '.join(points)} has one size and one length: a law needs two, and is reliable from five"
        )


def _fit_architecture(name: str, observed: Observations, bins: int | None) -> Fit:
    optima = optima_of([row for row in observed.searches if row.architecture == name])
    horizon = _horizon([optimum for optimum in optima if optimum.known_lr])
    laws, notes = _laws_of_size(optima, horizon)
    ratios = [optimum.tokens / optimum.parameters for optimum in optima]
    confounded = [LAWS[law][0] for law in laws if law == "batch" or not horizon]
    if confounded and max(ratios) > MAX_RATIO_SPREAD * min(ratios):
        notes.append(
            f"{' and '.join(confounded)}: from runs with {min(ratios):.3g} to {max(ratios):.3g} tokens per parameter, "
            "so the law over N includes the effect of the tokens"
        )
    if name in observed.scaled and "lr" in laws:
        del laws["lr"]
        notes.append(f"{LAWS['lr'][0]}: no law, since the rates are scaled to each width")
    if name in observed.separate:
        notes.append(f"{LAWS['lr'][0]}: without the comparisons with separate learning rates for parts of the model")
    runs = _best_runs([row for row in observed.runs if row.architecture == name])
    if not runs:
        return Fit(name, (), tuple(optima), None, laws, horizon, None, (*notes, "no finished run: no law of the loss"))
    n, d, losses = column(runs, "parameters"), column(runs, "tokens"), column(runs, "loss")
    frontier = scaling.frontier(n, d, losses, bins)
    compute_laws, compute_notes = _laws_of_compute(frontier)
    surface, surface_notes = _surface(n, d, losses)
    notes += compute_notes + surface_notes
    laws |= compute_laws
    return Fit(name, tuple(runs), tuple(optima), frontier, laws, horizon, surface, tuple(notes))


def _horizon(known: Sequence[SizeOptimum]) -> Horizon | None:
    columns = [(optimum.parameters, optimum.tokens, optimum.best.batch, optimum.best.lr) for optimum in known]
    return scaling.horizon(*np.array(columns).T) if columns else None


def optima_of(rows: Sequence[Observation]) -> list[SizeOptimum]:
    """Best settings for each size and number of tokens, ascending.

    A group with a single learning rate, or in which all runs diverged, is left out.
    """
    optima = []
    for parameters, tokens in sorted({(row.parameters, row.tokens) for row in rows}):
        group = [row for row in rows if (row.parameters, row.tokens) == (parameters, tokens)]
        if len({row.lr for row in group}) > 1:
            best = scaling.optimum(column(group, "batch"), column(group, "lr"), column(group, "loss"))
            if best:
                optima.append(SizeOptimum(parameters, tokens, best))
    return optima


def _best_runs(rows: Sequence[Observation]) -> list[Observation]:
    """For each size and number of tokens, the settings with the lowest mean loss over seeds, as one row."""
    seeds: dict[tuple[float, ...], list[Observation]] = {}
    for row in rows:
        seeds.setdefault((row.parameters, row.tokens, row.batch, row.lr), []).append(row)
    means = [replace(group[0], loss=float(column(group, "loss").mean())) for group in seeds.values()]
    lowest: dict[tuple[float, float], Observation] = {}
    for row in sorted(means, key=lambda row: (row.parameters, row.tokens, row.loss)):
        if math.isfinite(row.loss):
            lowest.setdefault((row.parameters, row.tokens), row)
    return list(lowest.values())


def _laws_of_size(optima: Sequence[SizeOptimum], horizon: Horizon | None) -> tuple[dict[str, PowerLaw], list[str]]:
    """Laws of the best batch and learning rate over N; with a horizon, of the rate at its tokens per parameter."""
    if not optima:
        return {}, ["no search over learning rates: no law of the best batch or of the best learning rate"]
    laws: dict[str, PowerLaw] = {}
    notes: list[str] = []

    def add(name: str, is_known: Callable[[SizeOptimum], bool]) -> None:
        # An edge only bounds the optimum. As a point of the law it would reflect the range that was tried.
        known = [optimum for optimum in optima if is_known(optimum)]
        edges = [format_count(optimum.parameters) for optimum in optima if not is_known(optimum)]
        if edges:
            notes.append(
                f"{LAWS[name][0]}: {len(edges)} of {len(optima)} optima are at an edge of the grid and left out of the "
                f"law ({', '.join(dict.fromkeys(edges))})"
            )
        x = np.array([optimum.parameters for optimum in known])
        y = np.array([getattr(optimum.best, name) for optimum in known])
        if horizon and name == "lr":
            ratios = np.array([optimum.tokens for optimum in known]) / x
            y *= (ratios / horizon.tokens_per_parameter) ** horizon.exponent
        _add_law(laws, notes, name, x, y)

    if all(optimum.best.batches == 1 for optimum in optima):
        notes.append("one batch per size: no law of the best batch, and the learning rates hold for that batch")
    else:
        add("batch", lambda optimum: optimum.known_batch)
    add("lr", lambda optimum: optimum.known_lr)
    return laws, notes


def _laws_of_compute(frontier: Frontier) -> tuple[dict[str, PowerLaw], list[str]]:
    laws: dict[str, PowerLaw] = {}
    notes: list[str] = []
    _add_law(laws, notes, "loss", frontier.compute, frontier.losses)
    known = frontier.bracketed
    if not known.all():
        notes.append(
            f"best size and tokens: {(~known).sum()} of {len(known)} compute bins lack a smaller or a larger size than "
            "the best and are left out of these laws"
        )
    _add_law(laws, notes, "size", frontier.compute[known], frontier.parameters[known])
    _add_law(laws, notes, "tokens", frontier.compute[known], frontier.tokens[known])
    return laws, notes


def _add_law(laws: dict[str, PowerLaw], notes: list[str], name: str, x: Array, y: Array) -> None:
    """Add the fitted law to ``laws`` if there are enough points, and to ``notes`` a warning if they are few."""
    points, title = len(np.unique(x)), LAWS[name][0]
    if points < MIN_POINTS:
        notes.append(f"{title}: no law (points: {points}, needed: {MIN_POINTS})")
        return
    laws[name] = power_law(x, y)
    if len(x) == MIN_POINTS:
        notes.append(f"{title}: a line through two points, so without an interval")
    elif len(x) < FEW_POINTS:
        notes.append(f"{title}: only {counted(len(x), 'point')}, so a wide interval")


def _surface(n: Array, d: Array, losses: Array) -> tuple[Surface | None, list[str]]:
    counts = (len(losses), len(np.unique(n)), len(np.unique(d)))
    if any(count < minimum for count, minimum in zip(counts, SURFACE_MINIMUM, strict=True)):
        note = "L(N, D): no law (runs: {}, sizes: {}, token counts: {}; needed: {}, {} and {})"
        return None, [note.format(*counts, *SURFACE_MINIMUM)]
    surface = scaling.surface(n, d, losses)
    known = np.isfinite(surface.covariance).all()
    return surface, [] if known else ["L(N, D): these runs do not determine its five coefficients"]
