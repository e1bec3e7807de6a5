"""Results of a sweep, stored in ``sweep.json``: every run with its settings, and activation sizes by width."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from antransformer.diagnostics.coord_check import CoordCheck
from antransformer.renamed import upgrade_flat
from antransformer.results.records import load_record, save_record

FILE = "sweep.json"
FORMAT = "antransformer-sweep"
VERSION = 5


@dataclass(frozen=True)
class SweepRun:
    """One run at one point of the grid.

    Attributes:
        architecture: architecture's name.
        size: preset's name, with the width where that differs from the preset's, such as ``nano-w64``.
        width: model width.
        parameters: number of learnable parameters.
        tokens: tokens of the run.
        batch: tokens of one step.
        lr: peak learning rate.
        seed: seed of the weights and of the data order.
        loss: validation loss in nats per token; infinite where the run diverged.
        bits_per_byte: validation loss in bits per byte of text.
        seconds_per_step: median over the steps; infinite where the run diverged before a measurement.
        folder: name of the run folder inside the sweep's ``runs``.
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
    """Results of a sweep.

    Attributes:
        setup: values that all runs share, as in ``Results``; ``settings`` has those that change what is computed.
        runs: every run.
        coord_check: activation sizes at each width; empty for sweeps over other sizes.

    Raises:
        ValueError: no runs, or ``setup`` has values of another type.
    """

    setup: dict[str, Any]
    runs: tuple[SweepRun, ...]
    coord_check: tuple[CoordCheck, ...] = ()

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs are missing")
        for name, expected_type in (("settings", dict), ("commands_before", list)):
            if not isinstance(self.setup.get(name, expected_type()), expected_type):
                raise ValueError(f"setup.{name} cannot be {self.setup[name]!r}")

    def merged_with(self, earlier: "Sweep") -> "Sweep":
        """Return this sweep with the runs and commands of an earlier sweep in the same folder added.

        Where both have a run or an activation size, this sweep's is kept. If the conditions of the activation sizes
        differ, only this sweep's are kept, since widths are compared at one learning rate, batch and depth.
        """
        folders = {run.folder for run in self.runs}
        models = {(sizes.architecture, sizes.width) for sizes in self.coord_check}
        conditions = {sizes.architecture: sizes.conditions for sizes in self.coord_check}
        comparable = [
            item
            for item in earlier.coord_check
            if conditions.get(item.architecture, item.conditions) == item.conditions
        ]
        commands = (*earlier.setup.get("commands_before", ()), earlier.setup.get("command"))
        before = [command for command in commands if command != self.setup.get("command")]
        return replace(
            self,
            setup={**self.setup, **({"commands_before": before} if before else {})},
            runs=(*(run for run in earlier.runs if run.folder not in folders), *self.runs),
            coord_check=(
                *(sizes for sizes in comparable if (sizes.architecture, sizes.width) not in models),
                *self.coord_check,
            ),
        )

    def save(self, folder: Path) -> None:
        """Write ``sweep.json``; infinite values become null."""
        save_record(self, folder / FILE, FORMAT, VERSION)

    @classmethod
    def load(cls, folder: Path) -> "Sweep":
        """Read ``sweep.json`` of this or an earlier release.

        Raises:
            DataError: the file is missing or damaged.
        """
        return load_record(cls, folder / FILE, FORMAT, VERSION, {2: _upgrade_2, 3: _upgrade_3, 4: _upgrade_4})


def _upgrade_2(content: dict[str, Any]) -> None:
    """Version 2 had other keys for the activation sizes, and settings had the names on the left in ``renamed.py``."""
    content["coord_check"] = [{**sizes, "rotation_deg": sizes["turned"]} for sizes in content.pop("coordinates")]
    setup = content["setup"]
    if "settings" in setup:
        setup["settings"] = upgrade_flat(setup["settings"])


def _upgrade_3(content: dict[str, Any]) -> None:
    """Version 3 did not store the learning rate of the activation sizes."""
    content["coord_check"] = [{**sizes, "peak_lr": None} for sizes in content["coord_check"]]


def _upgrade_4(content: dict[str, Any]) -> None:
    """Version 4 did not store preset and batch of the activation sizes, which the run with the smallest batch has."""
    runs = sorted(content["runs"], key=lambda run: run["batch"], reverse=True)
    smallest = {(run["architecture"], run["width"]): run for run in runs}
    for sizes in content["coord_check"]:
        run = smallest[sizes["architecture"], sizes["width"]]
        sizes |= {"preset": run["size"].removesuffix(f"-w{run['width']}"), "batch": run["batch"]}
