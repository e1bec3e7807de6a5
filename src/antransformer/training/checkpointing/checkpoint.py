"""Checkpoints: a folder each, of safetensors and a small JSON state; whole or not there at all.

    checkpoints/step-00001000/
        model.safetensors       the weights, by parameter name
        optimizer.safetensors   the optimizer's moments, as <parameter>.<moment>
        state.json              step, config of the model, sha256 of the other files

Of a run of many processes each writes its parts, into model-00002-of-00004.safetensors and its like, and any number of
processes reads them, each its own parts: tensor_files.py.

A checkpoint is written under a temporary name, flushed to the disk and renamed. What has no state.json, or whose files
do not match it, is not whole. Nothing is executed from a file.
"""

import concurrent.futures
import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from antransformer.errors import CheckpointError, NewerCheckpointError, WriteError
from antransformer.files import flush, read_json
from antransformer.models import Decoder, ModelConfig, build
from antransformer.models.config import OPTION_NAMES
from antransformer.renamed import upgrade_model, upgrade_settings
from antransformer.training.checkpointing.sharded_safetensors import LocalShards, TensorFiles, sha256
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext
from antransformer.training.optimizer import optimizer_state_keys

FORMAT = "antransformer-checkpoint"
VERSION = 2
STATE_FILE = "state.json"
KINDS = ("model", "optimizer")  # of tensor files
GRACE = 60.0  # seconds that a run which has failed waits for the checkpoint that is being written


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        path: its folder.
        step: completed optimizer steps.
        model: the model's config.
        extra: what else the run wrote (seconds trained, digest of the data).
        files: names of the tensor files, of as many processes as wrote it.
    """

    path: Path
    step: int
    model: ModelConfig
    extra: dict[str, Any]
    files: tuple[str, ...]

    def tensors(self, kind: str) -> TensorFiles:
        """The weights ("model") or the moments ("optimizer")."""
        return TensorFiles(self.path / name for name in self.files if name.startswith(kind))


class Writer:
    """Writes checkpoints into a folder while the run goes on, one at a time. Leaving it waits for the last.

    Of the processes that share a model all do what is done with it. The tensors are copied into main memory first, by
    each process what it writes.

    Args:
        folder: of all checkpoints.
        keep: how many of the newest stay.
        keep_every: those of a multiple of so many steps stay too.
        world: the processes that share the model.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every: int | None = None, world: DistributedContext = SINGLE_PROCESS
    ) -> None:
        self.folder, self.keep, self.keep_every, self.world = folder, keep, keep_every, world.with_new_group()
        self._pending: concurrent.futures.Future[None] | None = None
        self._thread: Thread | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        # A message between processes that failed is a RuntimeError: if one is gone or hangs, no write will end.
        elif self._pending is not None and not (self.world.size > 1 and issubclass(kind, RuntimeError)):
            concurrent.futures.wait([self._pending], GRACE)
            self._join()

    def save(self, step: int, model: Decoder, optimizer: Optimizer, extra: dict[str, Any]) -> Path:
        """Begin with the checkpoint of ``step``, when that before it is written; returns the folder that it will be in.

        Raises:
            WriteError: that before it could not be written.
        """
        self.wait()
        rank, size = self.world.rank, self.world.size
        tensors = (model.state_dict(), _optimizer_tensors(model, optimizer))
        parts = {tensor_file(kind, rank, size): LocalShards(of, rank) for kind, of in zip(KINDS, tensors, strict=True)}
        state = {"format": FORMAT, "version": VERSION, "step": step, "model": model.config.mapping(), "extra": extra}
        pending = self._pending = concurrent.futures.Future()

        def work() -> None:
            try:
                self._write(step, parts, state)
            except BaseException as error:
                pending.set_exception(error)
            else:
                pending.set_result(None)

        self._thread = Thread(target=work, daemon=True)  # a process that is to end does not wait for it
        self._thread.start()
        return self._target(step)

    def failed(self) -> bool:
        """Whether the checkpoint begun last is known to have failed: ``wait`` will raise an error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            WriteError: it could not be written; earlier ones are untouched.
        """
        pending = self._pending
        if pending is not None:
            concurrent.futures.wait([pending])
            self._join()
            self._pending = None
            pending.result()

    def _join(self) -> None:
        """Let a thread that is done free its tensors: an interpreter that ends in the middle of that is aborted."""
        if self._pending is not None and self._pending.done() and self._thread is not None:
            self._thread.join()

    def _target(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _write(self, step: int, parts: Mapping[str, LocalShards], state: dict[str, Any]) -> None:
        target, first = self._target(step), self.world.rank == 0
        partial = target.with_name(f".partial-{target.name}")

        def begin() -> None:
            if first:
                remove_partial(self.folder)
                partial.mkdir(parents=True)

        def write() -> dict[str, str]:
            return {name: part.write(partial / name) for name, part in parts.items()}

        def finish() -> None:
            if first:
                digests = {name: digest for written in each for name, digest in written.items()}
                _finish(partial, target, {**state, "sha256": digests})
                self._remove_old()

        try:
            self.world.gather_or_raise(begin)
            each = self.world.gather_or_raise(write)
            self.world.gather_or_raise(finish)
        except (OSError, SafetensorError) as error:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            last = max(step_folders(self.folder), key=step_of, default=None)
            rest = f"the one before it is {last}" if last else "there is no earlier one"
            raise WriteError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; {rest}"
            ) from error

    def _remove_old(self) -> None:
        for path in sorted(step_folders(self.folder), key=step_of)[: -self.keep]:
            if self.keep_every is None or step_of(path) % self.keep_every:
                with contextlib.suppress(OSError):
                    _remove(path)


def save(folder: Path, step: int, model: Decoder, optimizer: Optimizer, extra: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and remove all but the newest ``keep``.

    Raises:
        WriteError: it could not be written; earlier checkpoints are untouched.
    """
    with Writer(folder, keep) as writer:
        return writer.save(step, model, optimizer, extra)


def _finish(partial: Path, target: Path, state: dict[str, Any]) -> None:
    """Make a checkpoint of the tensor files that lie in ``partial``."""
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    flush(partial / STATE_FILE)
    flush(partial)
    # Later ones are of a future that was given up: broken, and the run resumed from before them.
    for path in step_folders(target.parent):
        if step_of(path) >= state["step"]:
            _remove(path)
    partial.rename(target)
    flush(target.parent)


def _remove(path: Path) -> None:
    """Remove a checkpoint; if that is cut short, what is left of it is not taken for one."""
    shutil.rmtree(path.rename(path.with_name(f".partial-removed-{path.name}")))


def newest(
    folder: Path, notify: Callable[[str], None], world: DistributedContext = SINGLE_PROCESS
) -> Checkpoint | None:
    """The newest whole checkpoint of ``folder``, or None; ``notify`` hears of each broken one that is passed over.

    Raises:
        CheckpointError: checkpoints are there, and none is whole.
        NewerCheckpointError: one was written by a newer release.
    """
    found = sorted(step_folders(folder), key=step_of, reverse=True)
    for path in found:
        try:
            return read(path, world)
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            notify(f"{error}; going back to the one before")
    if found:
        raise CheckpointError(f"{folder}: none of the {len(found)} checkpoints is whole")
    return None


def read(path: Path, world: DistributedContext = SINGLE_PROCESS) -> Checkpoint:
    """Verify one checkpoint folder. Processes that ask together share the work, and all get the same answer.

    Raises:
        CheckpointError: it is no checkpoint, or a file is missing, truncated or changed.
        NewerCheckpointError: it was written by a newer release.
    """
    return world.gather_or_raise(lambda: _read(path, world.rank, world.size))[0]


def _read(path: Path, rank: int, size: int) -> Checkpoint:
    """As ``read``, with every ``size``-th of the files verified."""
    try:
        state = read_json(path / STATE_FILE)
    except OSError as error:
        raise CheckpointError(f"{path}: not a checkpoint, {STATE_FILE} can not be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {STATE_FILE} is corrupted") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: {STATE_FILE} is not of the format {FORMAT}")
    if state.get("version") not in (1, VERSION):
        raise NewerCheckpointError(
            f"{path}: checkpoint version {state.get('version')!r}, this release reads {VERSION}: update antransformer"
        )
    try:
        step, fields, extra = state["step"], dict(state["model"]), dict(state["extra"])
        if state["version"] == 1:
            fields, extra = upgrade_model(fields), {**extra, "settings": upgrade_settings(extra.get("settings", {}))}
        model = ModelConfig(**fields)
        complete = model.mapping()
        # An option that came after the checkpoint was written has its default; a size may not be missing.
        missing = complete.keys() - fields.keys() - set(OPTION_NAMES)
        if missing or {**complete, **fields} != complete or step != step_of(path):
            raise ValueError("a field of the model is missing, or the step is not that of the folder's name")
        digests = dict(state["sha256"])
        writers = max(1, len(digests) // len(KINDS))
        if digests.keys() != {tensor_file(kind, writer, writers) for kind in KINDS for writer in range(writers)}:
            raise ValueError("sha256 is not that of all tensor files")
    except (KeyError, TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise CheckpointError(f"{path}: {STATE_FILE} is corrupted ({error})") from error
    for name in sorted(digests)[rank::size]:
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if sha256(path / name) != digests[name]:
            raise CheckpointError(f"{path}: {name} is truncated or corrupted (its sha256 differs)")
    return Checkpoint(path, step, model, extra, tuple(sorted(digests)))


def load_model(checkpoint: Checkpoint, model: Decoder) -> None:
    """Copy the checkpoint's weights into ``model``, or the parts of them that this process holds.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    weights = checkpoint.tensors("model")
    require_shapes(weights, model, checkpoint.path)
    weights.read_into(model.state_dict())


def require_shapes(weights: TensorFiles, model: Decoder, origin: Path) -> None:
    """Raise ``CheckpointError`` where the weights of ``origin`` are those of another model."""
    if weights.shapes != {name: value.shape for name, value in model.state_dict().items()}:
        raise CheckpointError(f"{origin}: its weights are those of another model")


def load_optimizer(checkpoint: Checkpoint, model: Decoder, optimizer: Optimizer) -> None:
    """Put the optimizer's moments back.

    Raises:
        CheckpointError: they are not those of this model.
    """
    saved = checkpoint.tensors("optimizer")
    parameters = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        name: {moment: _moment(moment, parameter) for moment in optimizer_state_keys(group)}
        for name, (group, parameter) in zip(_optimizer_names(model, optimizer), parameters, strict=True)
    }
    moments = {f"{name}.{moment}": value for name, kept in state.items() for moment, value in kept.items()}
    if saved.shapes != {name: value.shape for name, value in moments.items()}:
        raise CheckpointError(f"{checkpoint.path}: its optimizer state is that of another model")
    saved.read_into(moments)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(state.values()))})


def restore(checkpoint: Checkpoint, device: torch.device) -> Decoder:
    """The checkpoint's model, built and loaded, in evaluation mode."""
    with torch.device("meta"):
        model = build(checkpoint.model)
    weights = checkpoint.tensors("model")
    require_shapes(weights, model, checkpoint.path)  # before memory is taken for what the config says
    model.to_empty(device=device)
    weights.read_into(model.state_dict())
    return model.eval()


def tensor_file(kind: str, rank: int, size: int) -> str:
    """The name of what one of so many processes writes."""
    return f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors" if size > 1 else f"{kind}.safetensors"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or not, in no particular order."""
    return [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 for a folder of another name."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def remove_partial(folder: Path) -> None:
    """Clear away what an interrupted write left."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path)


def _optimizer_names(model: Decoder, optimizer: Optimizer) -> list[str]:
    """Parameter names in the optimizer's own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: Decoder, optimizer: Optimizer) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}.{moment}": value
        for name, parameter in zip(_optimizer_names(model, optimizer), parameters, strict=True)
        for moment, value in optimizer.state[parameter].items()
    }


def _moment(moment: str, parameter: Tensor) -> Tensor:
    """Memory for one; it is shared as its parameter is, but for the count of steps, which is one number."""
    if moment == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter, requires_grad=False)
