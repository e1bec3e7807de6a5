"""The loss curve of a run; needs the extra ``plots``."""

from pathlib import Path

from antransformer.errors import CheckpointError
from antransformer.extras import require
from antransformer.training.metrics import read_metrics

FIGURE_FORMATS = (".png", ".pdf", ".svg")


def loss_curve(run: Path) -> Path:
    """Draw training and validation loss over tokens into ``run/loss.png``.

    Raises:
        CheckpointError: the run has no metrics.
        MissingExtraError: matplotlib is not installed.
    """
    lines = [line for line in read_metrics(run / "metrics.jsonl") if {"tokens", "loss"} <= line.keys()]
    if not lines:
        raise CheckpointError(f"{run}: no metrics.jsonl with a line in it")
    figure = require("matplotlib.figure", "plots").Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    axes.plot(
        [line["tokens"] / 1e6 for line in lines],
        [line["loss"] for line in lines],
        lw=1,
        alpha=0.6,
        label="training batch",
    )
    held_out = [line for line in lines if "val_loss" in line]
    axes.plot(
        [line["tokens"] / 1e6 for line in held_out],
        [line["val_loss"] for line in held_out],
        "o-",
        ms=4,
        label="held out",
    )
    axes.set(
        xlabel="tokens (millions)",
        ylabel="loss (nats per token)",
        title=f"{run.name}: held-out loss {held_out[-1]['val_loss']:.3f}" if held_out else run.name,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "loss.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path
