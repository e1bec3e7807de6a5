"""Loss curve of a run; needs the extra ``plots``."""

from pathlib import Path

from antransformer.errors import CheckpointError
from antransformer.extras import require
from antransformer.training.metrics import read_lines


def loss_curve(run: Path) -> Path:
    """Draw training and validation loss over tokens into ``run/loss.png``.

    Raises:
        CheckpointError: the run has no metrics.
        MissingExtraError: matplotlib is not installed.
    """
    lines = [line for line in read_lines(run / "metrics.jsonl") if {"tokens", "loss"} <= line.keys()]
    if not lines:
        raise CheckpointError(f"{run}: metrics.jsonl is missing or empty")
    validated = [line for line in lines if "val_loss" in line]
    figure = require("matplotlib.figure", "plots").Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for name, label, points, options in (
        ("loss", "training batch", lines, {"lw": 1, "alpha": 0.6}),
        ("val_loss", "validation", validated, {"marker": "o", "ms": 4}),
    ):
        axes.plot([line["tokens"] / 1e6 for line in points], [line[name] for line in points], label=label, **options)
    axes.set(
        xlabel="tokens (millions)",
        ylabel="loss (nats per token)",
        title=f"{run.name}: validation loss {validated[-1]['val_loss']:.3f}" if validated else run.name,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "loss.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path
