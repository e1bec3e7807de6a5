"""Checkpoints: a folder each, of safetensors and a small JSON state; whole or not there at all.

    checkpoints/step-00001000/
        model.safetensors       the weights, by parameter name
        optimizer.safetensors   the optimizer's moments, as <parameter>.<moment>
        state.json              step, config of the model, sha256 of the two files

A checkpoint is written under a temporary name, flushed to the disk and renamed. What has no state.json, or whose files
do not match it, is not whole. Nothing is executed from a file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from antransformer.errors import CheckpointError, MachineError, NewerCheckpointError
from antransformer.files import read_json, require_file
from antransformer.models import Decoder, ModelConfig, build
from antransformer.models.config import OPTION_NAMES
from antransformer.training.optimizer import moments_of
from antransformer.training.parallel import like, whole

FORMAT = "antransformer-checkpoint"
VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        path: its folder.
        step: completed optimizer steps.
        model: the model's config.
        extra: what else the run wrote (seconds trained, digest of the data).
    """

    path: Path
    step: int
    model: ModelConfig
    extra: dict[str, Any]


def save(
    folder: Path,
    step: int,
    model: Decoder,
    optimizer: Optimizer,
    extra: dict[str, Any],
    keep: int,
    writes: bool = True,
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and remove all but the newest ``keep``.

    Of the processes that share a model all have to call this, and one of them ``writes``.

    Raises:
        MachineError: it could not be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{target.name}"
    tensors = {
        MODEL_FILE: _collected(model.state_dict().items(), writes),
        OPTIMIZER_FILE: _collected(_optimizer_tensors(model, optimizer), writes),
    }
    if not writes:
        return target
    try:
        remove_partial(folder)
        partial.mkdir(parents=True)
        for name, content in tensors.items():
            safetensors.torch.save_file(content, partial / name)
        state = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "model": model.config.mapping(),
            "extra": extra,
            "sha256": {name: sha256(partial / name) for name in tensors},
        }
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            _flush(file)
        # Later ones are of a future that was given up: broken, and the run resumed from before them.
        for path in step_folders(folder):
            if step_of(path) >= step:
                shutil.rmtree(path)
        partial.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        last = max(step_folders(folder), key=step_of, default=None)
        rest = f"the one before it is {last}" if last else "there is no earlier one"
        raise MachineError(
            f"the checkpoint of step {step} could not be written to {folder}: {reason}; {rest}"
        ) from error
    for old in sorted(step_folders(folder), key=step_of)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(folder: Path, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of ``folder``, or None; ``notify`` hears of each broken one that is passed over.

    Raises:
        CheckpointError: checkpoints are there, and none is whole.
        NewerCheckpointError: one was written by a newer release.
    """
    found = sorted(step_folders(folder), key=step_of, reverse=True)
    for path in found:
        try:
            return read(path)
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            notify(f"{error}; going back to the one before")
    if found:
        raise CheckpointError(f"{folder}: none of the {len(found)} checkpoints is whole")
    return None


def read(path: Path) -> Checkpoint:
    """Verify one checkpoint folder.

    Raises:
        CheckpointError: it is no checkpoint, or a file is missing, truncated or changed.
        NewerCheckpointError: it was written by a newer release.
    """
    try:
        state = read_json(path / STATE_FILE)
    except OSError as error:
        raise CheckpointError(f"{path}: not a checkpoint, {STATE_FILE} can not be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {STATE_FILE} is corrupted") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: {STATE_FILE} is not of the format {FORMAT}")
    if state.get("version") != VERSION:
        raise NewerCheckpointError(
            f"{path}: checkpoint version {state.get('version')!r}, this release reads {VERSION}: update antransformer"
        )
    try:
        step, model, extra = state["step"], ModelConfig(**state["model"]), dict(state["extra"])
        complete = model.mapping()
        # An option that came after the checkpoint was written has its default; a size may not be missing.
        missing = complete.keys() - state["model"].keys() - set(OPTION_NAMES)
        if missing or {**complete, **state["model"]} != complete or step != step_of(path):
            raise ValueError("a field of the model is missing, or the step is not that of the folder's name")
        digests = {name: str(state["sha256"][name]) for name in (MODEL_FILE, OPTIMIZER_FILE)}
    except (KeyError, TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise CheckpointError(f"{path}: {STATE_FILE} is corrupted ({error})") from error
    for name, digest in digests.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if sha256(path / name) != digest:
            raise CheckpointError(f"{path}: {name} is truncated or corrupted (its sha256 differs)")
    return Checkpoint(path, step, model, extra)


def load_model(checkpoint: Checkpoint, model: Decoder) -> None:
    """Copy the checkpoint's weights into ``model``.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    weights = load_tensors(checkpoint.path / MODEL_FILE)
    require_shapes(weights, model, checkpoint.path)
    shared = model.state_dict()
    model.load_state_dict({name: like(value, shared[name]) for name, value in weights.items()})


def require_shapes(weights: dict[str, Tensor], model: Decoder, origin: Path) -> None:
    """Raise ``CheckpointError`` where the weights of ``origin`` are those of another model."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if expected != {name: value.shape for name, value in weights.items()}:
        raise CheckpointError(f"{origin}: its weights are those of another model")


def load_optimizer(checkpoint: Checkpoint, model: Decoder, optimizer: Optimizer) -> None:
    """Put the optimizer's moments back.

    Raises:
        CheckpointError: they are not those of this model.
    """
    tensors = load_tensors(checkpoint.path / OPTIMIZER_FILE)
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        saved.setdefault(name, {})[moment] = value
    content = optimizer.state_dict()
    names = _optimizer_names(model, optimizer)
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    kept = [moments_of(group) for group in optimizer.param_groups for _ in group["params"]]
    moments = {
        name: {moment: torch.Size() if moment == "step" else shapes[name] for moment in keeps}
        for name, keeps in zip(names, kept, strict=True)
    }
    if {name: {key: value.shape for key, value in state.items()} for name, state in saved.items()} != moments:
        raise CheckpointError(f"{checkpoint.path}: its optimizer state is that of another model")
    content["state"] = {
        index: {
            moment: like(value, parameters[name]) if value.shape == shapes[name] else value
            for moment, value in saved[name].items()
        }
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict(content)


def restore(checkpoint: Checkpoint, device: torch.device) -> Decoder:
    """The checkpoint's model, built and loaded, in evaluation mode."""
    with torch.device("meta"):
        model = build(checkpoint.model)
    weights = load_tensors(checkpoint.path / MODEL_FILE)
    require_shapes(weights, model, checkpoint.path)  # before memory is taken for what the config says
    model.to_empty(device=device)
    model.load_state_dict(weights)
    return model.eval()


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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _optimizer_names(model: Decoder, optimizer: Optimizer) -> list[str]:
    """Parameter names in the optimizer's own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: Decoder, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(_optimizer_names(model, optimizer), parameters, strict=True):
        for moment, value in optimizer.state[parameter].items():
            yield f"{name}.{moment}", value


def _collected(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Tensors that may be shared, whole and in main memory where they are kept."""
    found = {}
    for name, value in tensors:
        collected = whole(value)
        if keep:
            found[name] = collected.cpu().contiguous()
    return found


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name.

    Raises:
        CheckpointError: it can not be read.
    """
    try:
        require_file(path)
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the latter of odd types and sizes
        raise CheckpointError(f"{path}: can not be read: {' '.join(str(error).split())}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
