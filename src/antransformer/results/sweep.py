"""What a sweep measured: every run with its settings, kept as ``sweep.json``."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from antransformer.diagnostics.coord_check import CoordCheck
from antransformer.errors import DataError
from antransformer.files import read_json, replace_text

FILE = "sweep.json"
FORMAT = "antransformer-sweep"
VERSION = 3  # version 2 has "turned" instead of "rotation_deg"

SMALLEST, LARGEST = 1e-30, 1e30  # beyond, products and powers would overflow


@dataclass(frozen=True)
class SweepRun:
    """One run at one point of the grid.

    Attributes:
        architecture, size: its cell; ``size`` is the preset's name, with the width where that is another.
        width: of the model.
        parameters: all learnable numbers.
        tokens: of the whole run.
        batch: tokens of one step.
        lr: peak learning rate.
        seed: of weights and data order.
        loss: validation loss in nats per token; infinite where the run diverged.
        bits_per_byte: the same per byte of text.
        seconds_per_step: median over the run; infinite where it diverged at once.
        folder: the run's folder inside the sweep's ``runs``.
    """

    architecture: str
    size: str
    width: int
    parameters: int
    tokens: int
    batch: int
    lr: float
    seed: int
    loss: float
    bits_per_byte: float
    seconds_per_step: float
    folder: str


@dataclass(frozen=True)
class Sweep:
    """A whole sweep; ``setup`` is what all runs share, for people, as in ``Results``."""

    setup: dict[str, Any]
    runs: tuple[SweepRun, ...]
    coordinates: tuple[CoordCheck, ...] = ()

    def joined(self, earlier: "Sweep") -> "Sweep":
        """With what an earlier one in the same folder holds beside it, and the commands that this came from."""
        here = {run.folder for run in self.runs}
        now = self.setup.get("command")
        commands = (*earlier.setup.get("commands_before", ()), earlier.setup.get("command"))
        before = [command for command in commands if command != now]
        measured = {(it.architecture, it.width) for it in self.coordinates}
        return replace(
            self,
            setup={**self.setup, **({"commands_before": before} if before else {})},
            runs=(*(run for run in earlier.runs if run.folder not in here), *self.runs),
            coordinates=(
                *(it for it in earlier.coordinates if (it.architecture, it.width) not in measured),
                *self.coordinates,
            ),
        )

    def save(self, folder: Path) -> Path:
        """Write ``sweep.json``; what is infinite is null there."""
        path = folder / FILE
        content = _plain({"format": FORMAT, "version": VERSION, **asdict(self)})
        replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: Path) -> "Sweep":
        """Read ``sweep.json``.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / FILE
        try:
            content = read_json(path)
            if content["format"] != FORMAT or content["version"] not in (2, VERSION):
                raise ValueError("another format or version")
            runs = tuple(_checked(SweepRun, entry) for entry in content["runs"])
            setup = content["setup"]
            if not runs or not isinstance(setup, dict):
                raise ValueError("no runs")
            for name, kind in (("settings", dict), ("commands_before", list)):
                if not isinstance(setup.get(name, kind()), kind):
                    raise ValueError(f"{name} can not be {setup[name]!r}")
            entries = [{"rotation_deg": entry.get("turned"), **entry} for entry in content["coordinates"]]
            return cls(setup, runs, tuple(_checked(CoordCheck, entry) for entry in entries))
        except OSError as error:
            raise DataError(f"{folder}: no sweep in it ({FILE}: {error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged or of another release ({error})") from error


def _checked(row_type: Any, entry: dict[str, Any]) -> Any:
    """A row of ``row_type`` from JSON, in which null stands for infinity.

    Raises:
        KeyError, TypeError: a field is missing, or there is no entry.
        ValueError: a value is of another type, or beyond what can be.
    """
    hints, values = get_type_hints(row_type), {}
    for name in (field.name for field in fields(row_type)):
        value = entry[name]
        if hints[name] is str:
            good = isinstance(value, str) and value and ".." not in value
        elif hints[name] is int:
            good = type(value) is int and (value > 0 or name in ("seed", "step")) and 0 <= value < 2**63
        elif hints[name] is float:
            value = _number(value)
            good = value < math.inf or name != "lr"
        else:
            value = tuple(map(_number, value))
            good = True
        if not good:
            raise ValueError(f"{name} can not be {value!r}")
        values[name] = value
    return row_type(**values)


def _number(value: Any) -> float:
    if value is not None and (type(value) not in (int, float) or not SMALLEST < value < LARGEST):
        raise ValueError(f"{value!r} is no positive number")
    return math.inf if value is None else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
