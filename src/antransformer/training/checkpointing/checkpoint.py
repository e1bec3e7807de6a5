"""Checkpoints: one folder each, with safetensors files and a small JSON file.

    checkpoints/step-00001000/
        model.safetensors       weights, by parameter name
        optimizer.safetensors   optimizer moments, as <parameter>.<moment>
        average.safetensors     averaged weights, by parameter name; only in runs with ``ema``
        state.json              step, model config, sha256 of the other files

A run of several ranks writes one file of each kind per rank, such as model-00002-of-00004.safetensors. Any number of
ranks can read them, each its own shards (sharded_safetensors.py).

A checkpoint is complete or absent: it is written under a temporary name, flushed to the disk and renamed. A folder
without state.json, or with files that do not match its checksums, is not used. No file is ever executed or unpickled.
"""

import concurrent.futures
import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
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
from antransformer.models.factory import build_to_load
from antransformer.renamed import upgrade_model, upgrade_settings
from antransformer.training.checkpointing.sharded_safetensors import LocalShards, TensorFiles, sha256
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext
from antransformer.training.optimizer import optimizer_state_keys

FORMAT = "antransformer-checkpoint"
VERSION = 3
VERSION_WITHOUT_AVERAGE = 2  # checkpoints without averaged weights are written as this one, for older releases
STATE_FILE = "state.json"
TENSOR_KINDS = ("model", "optimizer", "average")  # prefixes of the tensor files; not every checkpoint has an average
FINISH_TIMEOUT = 60.0  # seconds that a failed run waits for the checkpoint in progress


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk; with ``weights_only`` in ``read``, only its weights for inference are verified.

    Attributes:
        path: its folder.
        step: completed optimizer steps.
        model: config of the model.
        extra: other state of the run (seconds trained, digest of the data, settings).
        files: names of the tensor files of all ranks.
    """

    path: Path
    step: int
    model: ModelConfig
    extra: dict[str, Any]
    files: tuple[str, ...]

    @property
    def inference_kind(self) -> str:
        """Kind of the weights for inference: the averaged weights, if there are any."""
        return "average" if any(name.startswith("average") for name in self.files) else "model"

    def tensors(self, kind: str) -> TensorFiles:
        """Open the tensors of one of ``TENSOR_KINDS``: weights, optimizer moments or averaged weights."""
        return TensorFiles(self.path / name for name in self.files if name.startswith(kind))


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time; leaving the context waits for the last.

    All ranks that share a model create one and call it together. ``save`` copies this rank's shards to host memory, and
    training continues while the thread writes them.

    Args:
        folder: parent folder of all checkpoints.
        keep: number of latest checkpoints to keep.
        keep_every: keep checkpoints of multiples of this step permanently; None for none.
        dist_ctx: ranks that share the model.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None = None,
        dist_ctx: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        # The thread's collectives must not mix with collectives of the training loop.
        self.dist_ctx = dist_ctx.with_new_group()
        self._pending: concurrent.futures.Future[None] | None = None
        self._thread: Thread | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.wait()
            return
        # A failed collective is a RuntimeError. With a rank dead or hung, no write can finish: do not wait.
        rank_failed = self.dist_ctx.world_size > 1 and issubclass(error_type, RuntimeError)
        if self._pending is not None and not rank_failed:
            concurrent.futures.wait([self._pending], FINISH_TIMEOUT)
            self._join()

    def save(
        self,
        step: int,
        model: Decoder,
        optimizer: Optimizer,
        extra: dict[str, Any],
        average: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Start writing a checkpoint after the previous one is complete; return its future folder.

        Args:
            step: number of completed steps.
            model: model in training.
            optimizer: its optimizer.
            extra: other state of the run, as JSON data.
            average: state of the model with averaged weights, which inference will use instead of the model's.

        Raises:
            WriteError: the previous checkpoint could not be written.
        """
        self.wait()
        rank, world_size = self.dist_ctx.rank, self.dist_ctx.world_size
        states = {"model": model.state_dict(), "optimizer": _optimizer_tensors(model, optimizer)}
        if average is not None:
            states["average"] = dict(average)
        # Copied before the thread starts, because the next training step changes the tensors in place.
        shards = {
            tensor_file_name(kind, rank, world_size): LocalShards(tensors, rank) for kind, tensors in states.items()
        }
        version = VERSION_WITHOUT_AVERAGE if average is None else VERSION
        state = {"format": FORMAT, "version": version, "step": step, "model": model.config.mapping(), "extra": extra}
        pending = self._pending = concurrent.futures.Future()

        def write_in_thread() -> None:
            try:
                self._write(step, shards, state)
            except BaseException as error:
                pending.set_exception(error)
            else:
                pending.set_result(None)

        # An executor's threads would be joined when the interpreter exits, even if a dead rank blocks them forever.
        self._thread = Thread(target=write_in_thread, daemon=True)
        self._thread.start()
        return self._target(step)

    def failed(self) -> bool:
        """Return whether the checkpoint in progress is known to have failed, so that ``wait`` will raise."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Block until no checkpoint is being written.

        Raises:
            WriteError: it could not be written; earlier checkpoints are intact.
        """
        pending = self._pending
        if pending is not None:
            concurrent.futures.wait([pending])
            self._join()
            self._pending = None
            pending.result()

    def _join(self) -> None:
        # A thread that still frees its tensors while the interpreter shuts down aborts the process.
        if self._pending is not None and self._pending.done() and self._thread is not None:
            self._thread.join()

    def _target(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _write(self, step: int, shards: Mapping[str, LocalShards], state: dict[str, Any]) -> None:
        target, is_first = self._target(step), self.dist_ctx.rank == 0
        partial = target.with_name(f".partial-{target.name}")

        def make_folder() -> None:
            if is_first:
                remove_partial(self.folder)
                partial.mkdir(parents=True)

        def write_shards() -> dict[str, str]:
            return {name: local.write(partial / name) for name, local in shards.items()}

        def publish() -> None:
            if is_first:
                digests = {name: digest for of_rank in digests_by_rank for name, digest in of_rank.items()}
                _publish(partial, target, {**state, "sha256": digests})
                self._remove_old()

        try:
            # Each stage ends on all ranks before the next begins, and an error on one rank is raised on all.
            self.dist_ctx.gather_or_raise(make_folder)
            digests_by_rank = self.dist_ctx.gather_or_raise(write_shards)
            self.dist_ctx.gather_or_raise(publish)
        except (OSError, SafetensorError) as error:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            previous = max(step_folders(self.folder), key=step_of, default=None)
            remaining = f"the latest checkpoint is {previous}" if previous else "there is no earlier checkpoint"
            raise WriteError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {reason}; {remaining}"
            ) from error

    def _remove_old(self) -> None:
        for path in sorted(step_folders(self.folder), key=step_of)[: -self.keep]:
            if self.keep_every is None or step_of(path) % self.keep_every:
                with contextlib.suppress(OSError):  # an old checkpoint too many is no reason to end a run
                    _remove(path)


def save(folder: Path, step: int, model: Decoder, optimizer: Optimizer, extra: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint, remove all but the latest ``keep``, and return the new folder.

    Raises:
        WriteError: it could not be written; earlier checkpoints are intact.
    """
    with CheckpointWriter(folder, keep) as writer:
        return writer.save(step, model, optimizer, extra)


def _publish(partial: Path, target: Path, state: dict[str, Any]) -> None:
    """Complete the folder ``partial`` with its state file and rename it to ``target``."""
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    flush(partial / STATE_FILE)
    flush(partial)
    # Checkpoints of later steps belong to a history that was abandoned: they were damaged, so the run resumed earlier.
    for path in step_folders(target.parent):
        if step_of(path) >= state["step"]:
            _remove(path)
    partial.rename(target)
    flush(target.parent)


def _remove(path: Path) -> None:
    # Renamed first: if the deletion is interrupted or fails, the rest is not taken for a checkpoint.
    shutil.rmtree(path.rename(path.with_name(f".partial-removed-{path.name}")), ignore_errors=True)


def newest(
    folder: Path,
    notify: Callable[[str], None],
    dist_ctx: DistributedContext = SINGLE_PROCESS,
    weights_only: bool = False,
) -> Checkpoint | None:
    """Return the latest intact checkpoint in ``folder``, or None if there is no checkpoint.

    Args:
        folder: parent folder of the checkpoints.
        notify: receives a message for each damaged checkpoint that is skipped.
        dist_ctx: ranks that call this together.
        weights_only: as in ``read``.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged or incomplete.
        NewerCheckpointError: one was written by a newer release.
    """
    errors: list[CheckpointError] = []
    folders = dist_ctx.gather_or_raise(lambda: step_folders(folder))[0]  # a rank may see an older state of the disk
    for path in sorted(folders, key=step_of, reverse=True):
        if errors:
            notify(f"{errors[-1]}; trying the previous checkpoint")
        try:
            return read(path, dist_ctx, weights_only)
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise CheckpointError(f"{errors[-1]}; {folder} has no other complete checkpoint")
    return None


def read(path: Path, dist_ctx: DistributedContext = SINGLE_PROCESS, weights_only: bool = False) -> Checkpoint:
    """Verify a checkpoint folder and return its description.

    The ranks of ``dist_ctx`` divide the files among them, and all return or raise the same. A file that one of them has
    verified is not read again unless it changed. With ``weights_only`` only the files of ``inference_kind`` are needed;
    all others may be missing.

    Raises:
        CheckpointError: it is not a checkpoint, or a file is missing, truncated or changed.
        NewerCheckpointError: it was written by a newer release.
    """
    verified = set[str]().union(*dist_ctx.gather_or_raise(lambda: _verified_files(path)))
    return dist_ctx.gather_or_raise(lambda: _read(path, verified, dist_ctx.rank, dist_ctx.world_size, weights_only))[0]


_verified: dict[Path, tuple[int, int, int]] = {}  # fingerprints of the tensor files that this process has verified


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """Size, time of the last change and inode of a file."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def _verified_files(folder: Path) -> set[str]:
    """Names of the files in a folder that this process has verified and that have not changed since."""
    return {path.name for path in folder.glob("*.safetensors") if _verified.get(path) == _fingerprint(path)}


def _read(path: Path, verified: Collection[str], rank: int, world_size: int, weights_only: bool) -> Checkpoint:
    """Read the state file, and verify this rank's share of the needed tensor files that are not verified yet."""
    state = _read_state_file(path)
    try:
        step, fields, extra = state["step"], dict(state["model"]), dict(state["extra"])
        if state["version"] == 1:
            fields, extra = upgrade_model(fields), {**extra, "settings": upgrade_settings(extra.get("settings", {}))}
        model = ModelConfig(**fields)
        complete = model.mapping()
        # An option that was added after the checkpoint was written takes its default. Sizes must be given.
        missing = complete.keys() - fields.keys() - set(OPTION_NAMES)
        if missing or {**complete, **fields} != complete or step != step_of(path):
            raise ValueError("a field of the model is missing, or the step differs from that in the folder's name")
        digests = dict(state["sha256"])
        kinds = [kind for kind in TENSOR_KINDS if kind != "average" or state["version"] > VERSION_WITHOUT_AVERAGE]
        writers = max(1, len(digests) // len(kinds))
        expected = {tensor_file_name(kind, writer, writers) for kind in kinds for writer in range(writers)}
        if digests.keys() != expected:
            raise ValueError("sha256 does not list all tensor files")
    except (KeyError, TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise CheckpointError(f"{path}: {STATE_FILE} is corrupted ({error})") from error
    opened = Checkpoint(path, step, model, extra, tuple(sorted(digests)))
    needed = [name for name in opened.files if not weights_only or name.startswith(opened.inference_kind)]
    for name in needed:
        if not (path / name).is_file():
            advice = "" if name.startswith(opened.inference_kind) else " (--init, for a new run, needs weights only)"
            raise CheckpointError(f"{path}: {name} is missing{advice}")
    for name in sorted(set(needed) - set(verified))[rank::world_size]:
        fingerprint = _fingerprint(path / name)
        if sha256(path / name) != digests[name]:
            raise CheckpointError(f"{path}: {name} is truncated or corrupted (its sha256 differs)")
        _verified[path / name] = fingerprint
    return opened


def _read_state_file(path: Path) -> dict[str, Any]:
    """Return the content of state.json, of any version that this release reads."""
    try:
        state = read_json(path / STATE_FILE)
    except OSError as error:
        raise CheckpointError(f"{path}: not a checkpoint, cannot read {STATE_FILE}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {STATE_FILE} is corrupted") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: {STATE_FILE} does not have the format {FORMAT}")
    if state.get("version") not in range(1, VERSION + 1):
        raise NewerCheckpointError(
            f"{path}: checkpoint version {state.get('version')!r}, this release reads {VERSION}: update antransformer"
        )
    return state


def load_weights(checkpoint: Checkpoint, kind: str, target: Mapping[str, Tensor]) -> None:
    """Copy the weights ("model") or averaged weights ("average") into ``target``; of DTensors, the shards of this rank.

    Raises:
        CheckpointError: names or shapes of the weights differ.
    """
    weights = checkpoint.tensors(kind)
    require_shapes(weights, target, checkpoint.path)
    weights.read_into(target)


def require_shapes(weights: TensorFiles, target: Mapping[str, Tensor], origin: Path) -> None:
    """Raise ``CheckpointError`` if names or shapes of the weights in ``origin`` differ from those of ``target``."""
    if weights.shapes != {name: value.shape for name, value in target.items()}:
        raise CheckpointError(f"{origin}: the weights belong to another model")


def load_optimizer(checkpoint: Checkpoint, model: Decoder, optimizer: Optimizer) -> None:
    """Restore the optimizer's moments and step counts. Parameters that never had a gradient have none.

    Raises:
        CheckpointError: names or shapes of the moments differ.
    """
    saved, names = checkpoint.tensors("optimizer"), _optimizer_names(model, optimizer)
    with_moments = {name.rpartition(".")[0] for name in saved.shapes}
    parameters = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        name: {moment: _empty_moment(moment, parameter) for moment in optimizer_state_keys(group)}
        for name, (group, parameter) in zip(names, parameters, strict=True)
        if name in with_moments
    }
    moments = {f"{name}.{moment}": value for name, tensors in state.items() for moment, value in tensors.items()}
    if saved.shapes != {name: value.shape for name, value in moments.items()}:
        raise CheckpointError(f"{checkpoint.path}: the optimizer state belongs to another model")
    saved.read_into(moments)
    # load_state_dict identifies parameters by their position.
    by_position = {position: state[name] for position, name in enumerate(names) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_position})


def restore(checkpoint: Checkpoint, device: torch.device) -> Decoder:
    """Build the checkpoint's model on ``device`` with its weights for inference; the model is in evaluation mode."""
    with torch.device("meta"):
        model = build(checkpoint.model)
    weights = checkpoint.tensors(checkpoint.inference_kind)
    require_shapes(weights, model.state_dict(), checkpoint.path)  # before allocating the sizes that the config claims
    model = build_to_load(checkpoint.model, device)
    weights.read_into(model.state_dict())
    return model.eval()


def tensor_file_name(kind: str, rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes; it counts from 1, as Hugging Face shards do."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors" if world_size > 1 else f"{kind}.safetensors"


def step_folders(folder: Path) -> list[Path]:
    """Return all checkpoint folders, intact or damaged, in no particular order."""
    return [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder, or -1 for a folder of another name."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def remove_partial(folder: Path) -> None:
    """Delete the remains of interrupted writes and deletions, as far as possible."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)  # NFS keeps a deleted file that another process reads


def _optimizer_names(model: Decoder, optimizer: Optimizer) -> list[str]:
    """Return parameter names in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: Decoder, optimizer: Optimizer) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}.{moment}": value
        for name, parameter in zip(_optimizer_names(model, optimizer), parameters, strict=True)
        for moment, value in optimizer.state[parameter].items()
    }


def _empty_moment(moment: str, parameter: Tensor) -> Tensor:
    """Allocate a moment, sharded as its parameter; the step count and moments of rows are plain tensors."""
    if moment == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    if moment == "second_moment":
        return torch.zeros(len(parameter), 1, dtype=parameter.dtype, device=parameter.device)
    return torch.zeros_like(parameter, requires_grad=False)
