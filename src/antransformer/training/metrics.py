"""Metrics of a run: ``metrics.jsonl``, TensorBoard events, and norms of the weights."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from antransformer.bounds import Bound, norms
from antransformer.data import Split
from antransformer.errors import MachineError
from antransformer.files import replace_text
from antransformer.models import Decoder
from antransformer.nn import Residual
from antransformer.training.distributed.parallel import full_tensor, local_shard
from antransformer.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
NUMBERS = ("tokens", "loss", "val_loss", "bits_per_byte", "tokens_per_second")  # checked on reading


class MetricsLine(TypedDict):
    """One line of ``metrics.jsonl``.

    Attributes:
        step: number of completed steps.
        tokens: number of tokens trained on.
        loss: mean training loss since the previous line, in nats per token; missing if all these steps were skipped.
        grad_norm: gradient norm of the last step before clipping; missing with ``loss``.
        lr: learning rate of AdamW for vectors.
        tokens_per_second: training speed since the previous line.
        mfu: model FLOPs utilization; None if the peak of the device is unknown.
        largest_row_norm: largest norm of a weight vector, see ``weight_vectors``.
        mean_alpha: mean residual step size; None if the architecture has none.
        seconds: training time of the run, without validation.
        skipped: number of skipped steps, if ``max_skipped_steps`` is set.
        samples: texts by the model, on lines of ``sample_every``.
        val_loss: validation loss in nats per token, on lines with a validation; with ``ema``, of the averaged weights.
            All other values are measured on the weights in training.
        bits_per_byte: validation loss in bits per byte of text, on lines with a validation.
        val_loss_by_source: validation loss of each source of a mixture, on lines with a validation.
    """

    step: int
    tokens: int
    loss: NotRequired[float]
    grad_norm: NotRequired[float]
    lr: float
    tokens_per_second: float
    mfu: float | None
    largest_row_norm: float
    mean_alpha: float | None
    seconds: float
    skipped: NotRequired[int]
    samples: NotRequired[list[str]]
    val_loss: NotRequired[float]
    bits_per_byte: NotRequired[float]
    val_loss_by_source: NotRequired[dict[str, float]]


class Validation(TypedDict):
    """Results of a validation, with the keys of ``MetricsLine``."""

    val_loss: float
    bits_per_byte: float
    val_loss_by_source: NotRequired[dict[str, float]]


def mixed_validation(losses: Mapping[str, float], splits: Mapping[str, Split], weights: Sequence[float]) -> Validation:
    """Validation loss of a mixture: the mean over its sources.

    Args:
        losses: loss of each source in nats per token.
        splits: validation splits, with the same keys.
        weights: weight of each source; their sum is 1.
    """
    val_loss = sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True))
    tokens = next(iter(splits.values())).tokens
    size = sum(w * split.bytes * (tokens / split.tokens) for w, split in zip(weights, splits.values(), strict=True))
    return {"val_loss": val_loss, "bits_per_byte": val_loss * (tokens / size) / math.log(2)}


class MetricsLog:
    """Append-only JSON lines in a run folder, passed on to trackers.

    Args:
        folder: run folder.
        after: number of completed steps. Lines of later steps are removed, since a resumed run writes them again. If it
            is 0, earlier lines are kept in a file whose name ends in ``.old``, unless that has more lines.
        name: name of the file.
        trackers: receive every line too.

    Attributes:
        last: last line of the file before the first ``write``; empty without one.
    """

    def __init__(self, folder: Path, after: int, name: str = METRICS_FILE, trackers: Sequence[Tracker] = ()) -> None:
        self.path = folder / name
        earlier = read_lines(self.path)
        lines = [line for line in earlier if line["step"] <= after]
        old = self.path.with_name(f"{name}.old")
        if not after and len(earlier) > len(read_lines(old)):  # the checkpoints may be missing by mistake
            self.path.replace(old)
        replace_text(self.path, _text(lines))
        self.last = lines[-1] if lines else {}
        self._trackers = trackers

    def write(self, line: Mapping[str, Any], flush: bool = False) -> None:
        """Append one line, which has at least the key ``step``; ``flush`` forces the file to the disk.

        Raises:
            ValueError: a value is NaN or infinite.
            MachineError: the file cannot be written.
        """
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:  # opened for each line, so that none stays in a buffer
                file.write(text)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"{self.path} cannot be written: {error.strerror}") from error
        for tracker in self._trackers:
            tracker.write(line)

    def complete(self, values: Mapping[str, Any]) -> None:
        """Add values to ``last``, in the file and in the trackers; called before the first ``write``.

        Raises:
            OSError: the file cannot be written.
        """
        lines = [*read_lines(self.path)[:-1], {**self.last, **values}]
        replace_text(self.path, _text(lines))
        for tracker in self._trackers:
            tracker.write({"step": self.last["step"], **values})

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[MetricsLine]:
    """Lines of a ``metrics.jsonl``; see ``read_lines``. A line of an older release may lack keys."""
    return cast(list[MetricsLine], read_lines(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Valid lines of a file by ``MetricsLog``; empty if the file does not exist."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # a killed run may leave an incomplete last line
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and _has_numbers(line):
            lines.append(line)
    return lines


def _text(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _has_numbers(line: Mapping[str, Any]) -> bool:
    values = (line[name] for name in NUMBERS if name in line)
    return all(type(value) in (int, float) and abs(value) < 1e300 for value in values)


def weight_vectors(model: Decoder) -> list[Bound]:
    """Bounded weight vectors of a model; the rows of all its matrices if it has no bounds."""
    return model.bounds() or [Bound(name, weight) for name, weight in model.named_parameters() if weight.ndim == 2]


@torch.no_grad()
def largest_row_norm(model: Decoder) -> Tensor:
    """Largest norm of a weight vector (see ``weight_vectors``) as a 0-dim tensor."""
    return torch.stack([full_tensor(norms(bound)).amax() for bound in weight_vectors(model)]).amax()


@torch.no_grad()
def mean_alpha(model: Decoder) -> Tensor | None:
    """Mean residual step size over all layers and coordinates; None if the architecture has none."""
    alphas = [full_tensor(module.alpha()).mean() for module in model.modules() if isinstance(module, Residual)]
    return torch.stack(alphas).mean() if alphas else None


@torch.no_grad()
def has_finite_weights(model: Decoder) -> bool:
    """Return whether all weights on this rank are finite; this waits for the device."""
    return bool(torch.stack([local_shard(weight).isfinite().all() for weight in model.parameters()]).all())
