"""Trackers, which show the metrics of runs in a browser: TensorBoard, and Weights & Biases (wandb)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from antransformer.errors import ConfigError
from antransformer.extras import require
from antransformer.training.config import TrainConfig, to_mapping

ID_FILE = "wandb-id.txt"  # so that a resumed run continues its page
PROJECT = "antransformer"  # unless WANDB_PROJECT is set


class Tracker(Protocol):
    """Receives the metrics lines of a run."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Show the numbers of a line, and its samples."""

    def close(self) -> None:
        """Send what is left."""


def check_trackers(config: TrainConfig) -> None:
    """Check that the trackers of a run can be used.

    Raises:
        MissingExtraError: a tracker is not installed.
        ConfigError: wandb has no account, and is not offline.
    """
    if config.tensorboard:
        require("tensorboard", "track")
    if config.track == "wandb":
        wandb = require("wandb", "track")
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError("wandb has no account: run wandb login, or set WANDB_MODE=offline")


def open_trackers(config: TrainConfig, folder: Path, after: int) -> list[Tracker]:
    """Open the trackers of a run, as ``check_trackers`` has found them.

    Args:
        config: settings of the run.
        folder: run folder.
        after: number of completed steps; TensorBoard removes what it has of later ones.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder, after))
    if config.track == "wandb":
        trackers.append(Wandb(folder, config))
    return trackers


class TensorBoard:
    """Events in ``folder/tensorboard``."""

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add scalars, and the samples as text."""
        for name, value in numbers(line).items():
            self._events.add_scalar(name, value, line["step"])
        if "samples" in line:
            self._events.add_text("samples", "\n\n---\n\n".join(line["samples"]), line["step"])

    def close(self) -> None:
        """Flush and close the events."""
        self._events.close()


class Wandb:
    """A run of Weights & Biases with the settings as its config; its files are in ``folder/wandb``."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        wandb = require("wandb", "track")
        file = folder / ID_FILE
        self._html = wandb.Html
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=file.read_text(encoding="ascii").strip() if file.exists() else None,
            resume="allow",
            dir=folder,
            config=to_mapping(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        file.write_text(f"{self._run.id}\n", encoding="ascii")
        # wandb's own count of steps must rise, but a resumed run begins again at its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, Any]) -> None:
        """Log the numbers, and the samples as text."""
        samples = {
            f"sample {number}": self._html(_preformatted(text)) for number, text in enumerate(line.get("samples", ()))
        }
        self._run.log({"step": line["step"], **numbers(line), **samples})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a metrics line, without the step; the loss of a source is ``val_loss/NAME``."""
    by_source = {f"val_loss/{name}": value for name, value in line.get("val_loss_by_source", {}).items()}
    values = {name: value for name, value in line.items() if name != "step" and type(value) in (int, float)}
    return {**values, **by_source}


def _preformatted(text: str) -> str:
    from html import escape

    return f"<pre>{escape(text)}</pre>"
