"""Loss curve of a run; needs the extra ``plots``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from antransformer.errors import CheckpointError
from antransformer.figure_style import SERIES, new_figure, save, style
from antransformer.reporting.labels import format_count
from antransformer.training.metrics import METRICS_FILE, read_lines


def loss_curve(run: Path) -> Path:
    """Draw training and validation loss over tokens into ``run/loss.png``.

    Raises:
        CheckpointError: the run has no metrics.
        MissingExtraError: matplotlib is not installed.
    """
    lines = _lines(run)
    if not lines:
        raise CheckpointError(f"{run}: metrics.jsonl is missing or empty")
    validated = [line for line in lines if "val_loss" in line]
    with style(extra="plots"):
        figure, axes = new_figure()
        axes.plot(*_columns(lines, "loss"), lw=1, color=SERIES[0], alpha=0.6, label="training batch")
        if validated:
            axes.plot(*_columns(validated, "val_loss"), "o-", color=SERIES[1], label="validation")
        axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
        axes.set(xlabel="tokens", ylabel="loss (nats per token)")
        axes.legend()
        figure.suptitle(f"{run.name}: validation loss {validated[-1]['val_loss']:.3f}" if validated else run.name)
        save(figure, path := run / "loss.png")
    return path


def has_losses(run: Path) -> bool:
    """Whether a run has anything to draw: its metrics may be gone, and it may have skipped all steps."""
    return bool(_lines(run))


def _lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / METRICS_FILE) if {"tokens", "loss"} <= line.keys()]


def _columns(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [line["tokens"] for line in lines], [line[name] for line in lines]
