"""What a run writes down: one JSON object a line, TensorBoard where asked for, and norms worth watching."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antransformer.bounds import Bound, norms
from antransformer.errors import MachineError, MissingExtraError
from antransformer.files import replace_text
from antransformer.models import Decoder
from antransformer.nn import Residual
from antransformer.training.distributed.parallel import full_tensor


class MetricsLog:
    """Append-only ``metrics.jsonl`` in a run folder, and TensorBoard events beside it.

    Args:
        folder: the run folder.
        after: lines of later steps than this are dropped; a resumed run writes them again.
        tensorboard: write events to ``folder/tensorboard`` too.
        name: of the file.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, after: int, tensorboard: bool = False, name: str = "metrics.jsonl") -> None:
        self.path = folder / name
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._events = _event_writer(folder / "tensorboard", after) if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it holds at least ``step``.

        Raises:
            MachineError: it could not be written.
        """
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:  # each time: no line waits in a buffer
                file.write(text)
        except OSError as error:
            raise MachineError(f"{self.path} can not be written: {error.strerror}") from error
        if self._events is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush and close the events."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line cut off by a kill is left out, a missing file has none."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and _are_numbers(line):
            lines.append(line)
    return lines


def _are_numbers(line: Mapping[str, Any]) -> bool:
    """Whether what is drawn and printed of a line can be."""
    values = (
        line[name] for name in ("tokens", "loss", "val_loss", "bits_per_byte", "tokens_per_second") if name in line
    )
    return all(type(value) in (int, float) and abs(value) < 1e300 for value in values)


def weight_vectors(model: Decoder) -> list[Bound]:
    """The bounded vectors of a model, or the rows of all its matrices where it has no bounds."""
    return model.bounds() or [Bound(name, weight) for name, weight in model.named_parameters() if weight.ndim == 2]


@torch.no_grad()
def largest_row_norm(model: Decoder) -> Tensor:
    """Largest norm of a weight vector (see ``weight_vectors``); a 0-dim tensor."""
    return torch.stack([full_tensor(norms(bound)).amax() for bound in weight_vectors(model)]).amax()


@torch.no_grad()
def mean_alpha(model: Decoder) -> Tensor | None:
    """Mean residual step over all layers and coordinates; None for a model without."""
    alphas = [full_tensor(module.alpha()).mean() for module in model.modules() if isinstance(module, Residual)]
    return torch.stack(alphas).mean() if alphas else None


def _event_writer(folder: Path, after: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "track") from error
    return SummaryWriter(str(folder), purge_step=after + 1)
