"""The scaling laws of each architecture from what was observed, with what they can not say in words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from antransformer.errors import DataError
from antransformer.reporting.labels import format_count
from antransformer.results.observations import BestSettings, Observation, Observations, column
from antransformer.scaling import fitting as scaling
from antransformer.scaling.fitting import Array, Frontier, Optimum, PowerLaw, Surface, power_law

LEAST = 2  # points of a law
SURFACE_LEAST = (6, 3, 3)  # runs, sizes and token counts of L(N, D), which has five numbers
# What a law is of, and of what it is a function.
LAWS = {
    "batch": ("best batch", "N"),
    "lr": ("best learning rate", "N"),
    "loss": ("loss", "C"),
    "size": ("best size", "C"),
    "tokens": ("best tokens", "C"),
}


@dataclass(frozen=True)
class SizeOptimum:
    """The best settings for one size and number of tokens; ``tokens`` is NaN where it is not known."""

    parameters: float
    tokens: float
    best: Optimum

    @property
    def known_batch(self) -> bool:
        """Whether the best batch is one, and not merely the edge of what was tried."""
        return self.best.lr_bracketed and self.best.batch_bracketed

    @property
    def known_lr(self) -> bool:
        """The same of the learning rate; with a single batch it is the best one for that."""
        return self.best.lr_bracketed and (self.best.batch_bracketed or self.best.batches == 1)


@dataclass(frozen=True)
class Fit:
    """All laws of one architecture.

    Attributes:
        name: the architecture.
        runs: finite losses, one for each size and number of tokens: the lowest of those tried, averaged over seeds.
        optima: best settings by size, then tokens.
        frontier: the runs that the laws of compute are fitted to; None without runs.
        laws: those of ``LAWS`` that can be had.
        surface: L(N, D); None from too few runs.
        notes: what is missing, or rests on little.
    """

    name: str
    runs: tuple[Observation, ...]
    optima: tuple[SizeOptimum, ...]
    frontier: Frontier | None
    laws: dict[str, PowerLaw]
    surface: Surface | None
    notes: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """For JSON: the laws by name beside the rest; what is infinite or not a number becomes null."""
        whole = {**{name: asdict(law) for name, law in self.laws.items()}, "optima": [asdict(it) for it in self.optima]}
        if self.frontier:
            columns = {name: values.tolist() for name, values in asdict(self.frontier).items()}
            whole["frontier"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if self.surface:
            whole["surface"] = asdict(self.surface)
        return _plain({**whole, "notes": self.notes})


def fit_optima(rows: Sequence[BestSettings]) -> list[Fit]:
    """The laws of batch and learning rate alone, from best settings that were found elsewhere.

    Raises:
        DataError: no architecture has two sizes.
    """
    fits = []
    for name in dict.fromkeys(row.architecture for row in rows):
        own = sorted((row for row in rows if row.architecture == name), key=lambda row: row.parameters)
        optima = [
            SizeOptimum(row.parameters, math.nan, Optimum(row.batch, row.lr, math.nan, True, True, 3)) for row in own
        ]
        laws, notes = _laws_of_size(optima)
        fits.append(Fit(name, (), tuple(optima), None, laws, None, tuple(notes)))
    return _checked(fits, rows)


def fit(observed: Observations, bins: int | None = None) -> list[Fit]:
    """All laws of each architecture.

    Args:
        observed: the runs.
        bins: of compute; by default four a decade.

    Raises:
        DataError: no architecture has two sizes.
    """
    everything = (*observed.searches, *observed.runs)
    return _checked([_fit(name, observed, bins) for name in _names(everything)], everything)


def _names(rows: Iterable[Observation]) -> dict[str, None]:
    return dict.fromkeys(row.architecture for row in rows)


def _checked(fits: list[Fit], rows: Sequence[Observation | BestSettings]) -> list[Fit]:
    sizes = {it.name: len({row.parameters for row in rows if row.architecture == it.name}) for it in fits}
    if max(sizes.values()) < LEAST:
        raise DataError(f"too few sizes for a law over them: one of {', '.join(sizes)}; two are needed, five are good")
    return fits


def _fit(name: str, observed: Observations, bins: int | None) -> Fit:
    optima = optima_of([row for row in observed.searches if row.architecture == name])
    laws, notes = _laws_of_size(optima)
    ratios = [it.tokens / it.parameters for it in optima]
    if laws and max(ratios) > 1.5 * min(ratios):
        notes.append(
            f"best batch and learning rate are of {min(ratios):.3g} to {max(ratios):.3g} tokens a parameter: their "
            "laws over N hold what tokens do, too"
        )
    runs = _lowest([row for row in observed.runs if row.architecture == name])
    if not runs:
        return Fit(name, (), tuple(optima), None, laws, None, (*notes, "no finished run: no law of the loss"))
    n, d, losses = column(runs, "parameters"), column(runs, "tokens"), column(runs, "loss")
    front = scaling.frontier(n, d, losses, bins)
    more, said = _laws_of_compute(front)
    surface, also = _surface(n, d, losses)
    return Fit(name, tuple(runs), tuple(optima), front, {**laws, **more}, surface, (*notes, *said, *also))


def optima_of(rows: Sequence[Observation]) -> list[SizeOptimum]:
    """Of each size and number of tokens at which more than one learning rate was tried, and not all diverged."""
    found = []
    for parameters, tokens in sorted({(row.parameters, row.tokens) for row in rows}):
        own = [row for row in rows if (row.parameters, row.tokens) == (parameters, tokens)]
        if len({row.lr for row in own}) > 1:
            best = scaling.optimum(column(own, "batch"), column(own, "lr"), column(own, "loss"))
            if best:
                found.append(SizeOptimum(parameters, tokens, best))
    return found


def _lowest(rows: Sequence[Observation]) -> list[Observation]:
    """For each size and number of tokens the settings with the lowest mean loss, as one row."""
    seeds: dict[tuple[float, ...], list[Observation]] = {}
    for row in rows:
        seeds.setdefault((row.parameters, row.tokens, row.batch, row.lr), []).append(row)
    means = [replace(same[0], loss=float(column(same, "loss").mean())) for same in seeds.values()]
    lowest: dict[tuple[float, float], Observation] = {}
    for row in sorted(means, key=lambda row: (row.parameters, row.tokens, row.loss)):
        if math.isfinite(row.loss):
            lowest.setdefault((row.parameters, row.tokens), row)
    return list(lowest.values())


def _laws_of_size(optima: Sequence[SizeOptimum]) -> tuple[dict[str, PowerLaw], list[str]]:
    if not optima:
        return {}, ["no learning rates were searched: no law of the best one, nor of the best batch"]
    notes = []
    single = all(it.best.batches == 1 for it in optima)
    if single:
        notes.append("one batch was tried at each size: no law of the best batch, and the learning rates are for it")
    laws: dict[str, PowerLaw] = {}
    for name in ("lr",) if single else ("batch", "lr"):
        known = [it for it in optima if (it.known_batch if name == "batch" else it.known_lr)]
        if edges := [it for it in optima if it not in known]:
            notes.append(
                f"{LAWS[name][0]}: at {len(edges)} of {len(optima)} places the best lies at an edge of what was tried "
                f"({_listed(edges)}); they are left out of the law"
            )
        x = np.array([it.parameters for it in known])
        _add_law(laws, notes, name, x, np.array([getattr(it.best, name) for it in known]))
    return laws, notes


def _listed(optima: Sequence[SizeOptimum]) -> str:
    return ", ".join(dict.fromkeys(format_count(it.parameters) for it in optima))


def _laws_of_compute(front: Frontier) -> tuple[dict[str, PowerLaw], list[str]]:
    laws: dict[str, PowerLaw] = {}
    notes: list[str] = []
    _add_law(laws, notes, "loss", front.compute, front.losses)
    known = front.bracketed
    if not known.all():
        notes.append(
            f"best size and tokens: {(~known).sum()} of {len(known)} bins of compute have no smaller and larger size "
            "beside the best one; they are left out of these laws"
        )
    _add_law(laws, notes, "size", front.compute[known], front.parameters[known])
    _add_law(laws, notes, "tokens", front.compute[known], front.tokens[known])
    return laws, notes


def _add_law(laws: dict[str, PowerLaw], notes: list[str], name: str, x: Array, y: Array) -> None:
    """Fit one where there are points for it, and say where there are few."""
    points, title = len(np.unique(x)), LAWS[name][0]
    if points < LEAST:
        notes.append(f"{title}: no law, for {points} point{'' if points == 1 else 's'} of the {LEAST} needed")
        return
    laws[name] = power_law(x, y)
    if len(x) == LEAST:
        notes.append(f"{title}: a line through two points, and nothing that says how far off it is")
    elif len(x) < 5:
        notes.append(f"{title}: {len(x)} points only, so a wide interval")


def _surface(n: Array, d: Array, losses: Array) -> tuple[Surface | None, list[str]]:
    found = (len(losses), len(np.unique(n)), len(np.unique(d)))
    if any(have < least for have, least in zip(found, SURFACE_LEAST, strict=True)):
        need = "needs {} runs of {} sizes and {} token counts".format(*SURFACE_LEAST)
        return None, ["L(N, D) " + need + "; there are {} of {} and {}".format(*found)]
    surface = scaling.surface(n, d, losses)
    known = np.isfinite(surface.covariance).all()
    return surface, [] if known else ["L(N, D): these runs do not tell its five numbers apart"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
