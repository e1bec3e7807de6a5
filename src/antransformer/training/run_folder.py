"""The run folder: all files that a run reads when it resumes and leaves when it ends.

config.yaml      complete settings
tokenizer.json   tokenizer of the data
metrics.jsonl    one line per logged step
checkpoints/     see training/checkpointing/checkpoint.py
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from antransformer.data import Dataset, Tokenizer
from antransformer.data.mixture_spec import absolute
from antransformer.data.shards import META_FILE
from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.files import check_folder_target, quoted, replace_text
from antransformer.lock import HOLDER_FILE, LOCK_FILE
from antransformer.models.config import preset_sizes
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.config import (
    LEGACY_DEFAULTS,
    MUTABLE_ON_RESUME,
    TrainConfig,
    merge,
    normalize_settings,
    resolve_config,
    round_to_sequences,
    to_mapping,
)
from antransformer.training.config_files import format_settings, read_settings
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS = "checkpoints"


def default_folder(config: TrainConfig) -> Path:
    """Free folder for a new run: ``runs/angpt-nano``, with a number if that exists."""
    name = f"{config.model.architecture}-{config.preset}"
    candidates = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(folder for folder in candidates if not folder.exists())


def require_empty(folder: Path, resumable: bool = True) -> None:
    """Check that a folder can hold a new run.

    Args:
        folder: run folder.
        resumable: whether the caller can resume the run in it.

    Raises:
        ConfigError: the folder exists and is not empty, or it or a parent of it is a file.
    """
    check_folder_target(folder)
    if not folder.exists():
        return
    # Files of a run that was killed while creating its folder, or is still creating it. The config is written last.
    tokenizer_files = (TOKENIZER_FILE, "tokenizer_config.json")
    partial = {f"{name}.partial" for name in (*tokenizer_files, CONFIG_FILE, HOLDER_FILE)}
    unfinished = {CHECKPOINTS, *tokenizer_files, LOCK_FILE, HOLDER_FILE} | partial
    if {path.name for path in folder.iterdir()} - unfinished or any((folder / CHECKPOINTS).glob("*")):
        resume = ", or continue the run in it with --resume (resume=True)" if resumable else ""
        raise ConfigError(f"{folder} is not empty: choose another --out{resume}")


def create_run_folder(folder: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Create the folder of a new run; raises the errors of ``write_run_folder``."""
    write_run_folder(folder, to_mapping(config), dataset.tokenizer())


def write_run_folder(folder: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Create a run folder without checkpoints.

    Raises:
        ConfigError: the folder is not empty or cannot be created.
    """
    require_empty(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created: {error.strerror}; choose another --out") from error
    tokenizer.save(folder / TOKENIZER_FILE)
    replace_text(folder / CONFIG_FILE, format_settings(settings))  # last, so that a folder with a config is complete


def has_started(folder: Path) -> bool:
    """Whether the run in ``folder`` has a checkpoint, from which it resumes."""
    return bool(checkpoint.step_folders(folder / CHECKPOINTS))


def require_same_tokenizer(folder: Path, dataset: Dataset) -> None:
    """Raise ``CheckpointError`` if the tokenizer of the run in ``folder`` is not the one of its data.

    The data may have been prepared again since the start, and the tokenizer in the folder would decode it wrongly.
    """
    file = folder / TOKENIZER_FILE
    if file.is_file() and Tokenizer.load(file).encoding_rules() != dataset.tokenizer().encoding_rules():
        raise CheckpointError(
            f"{folder} was started with another tokenizer or end-of-text token than that of {dataset.path}: restore "
            "the data, or start a new run with another --out"
        )


def save_config(folder: Path, config: TrainConfig) -> None:
    """Replace the config of the run in ``folder`` atomically."""
    replace_text(folder / CONFIG_FILE, format_settings(to_mapping(config)))


def saved_settings(folder: Path) -> dict[str, Any]:
    """Settings of the run in ``folder``.

    Raises:
        CheckpointError: there is no run.
        ConfigError: its config cannot be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        problem = f"has no {CONFIG_FILE}, the settings of a run" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {problem}")
    return read_settings(folder / CONFIG_FILE, default_version=1)


def saved_config(folder: Path) -> TrainConfig:
    """Config of the run in ``folder``; raises the errors of ``saved_settings`` and ``resolve_config``."""
    settings = {**LEGACY_DEFAULTS, **saved_settings(folder)}
    # The saved settings hold the model's vocab_size, so the default does not matter.
    return resolve_config(settings, vocab_size=1, where=str(folder / CONFIG_FILE))


def resumed_config(folder: Path, changes: Mapping[str, Any]) -> TrainConfig:
    """Config of the run in ``folder`` with changes of settings that are mutable on resume.

    Raises:
        CheckpointError: there is no run to resume, or a change would affect what it computes.
        ConfigError: a setting is wrong.
    """
    saved = saved_settings(folder)
    model = saved.get("model")
    if not isinstance(model, dict) or "vocab_size" not in model:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not the complete config of a run: restore it")
    if "tokens" not in saved:
        raise CheckpointError(
            f"{folder} has imported weights and no run to resume: start a run from them with --init {quoted(folder)}"
        )
    complete = saved_config(folder)
    before, changes = to_mapping(complete), normalize_settings(changes, "command line")
    if changes.get("init"):  # recorded as an absolute path
        changes["init"] = absolute(changes["init"])
    if "batch_tokens" in changes:  # rounded as when the run started
        changes["batch_tokens"] = round_to_sequences(changes["batch_tokens"], complete.model.context)
    if changes.get("precision") == "auto":  # recorded as what it was when the run started
        del changes["precision"]
    if not complete.lr_horizon:  # recorded as 0, since it has no effect
        changes.pop("horizon_exponent", None)
    fixed = {
        key: (before.get(key), value) for key, value in changes.items() if key not in (*MUTABLE_ON_RESUME, "model")
    }
    fixed |= {f"model.{key}": (before["model"].get(key), value) for key, value in changes.get("model", {}).items()}
    for key, (old, new) in fixed.items():
        if old != new:
            raise CheckpointError(
                f"{folder} was trained with {key} {old}, not {new}: leave it out, or start a new run with another --out"
            )
    mutable = {key: value for key, value in changes.items() if key in MUTABLE_ON_RESUME}
    return resolve_config({**before, **mutable}, vocab_size=1)


def with_initial_model(
    settings: Mapping[str, Any], notify: Callable[[str], None], dist_ctx: DistributedContext = SINGLE_PROCESS
) -> dict[str, Any]:
    """Add the model settings of the checkpoint in ``init``, if set, to normalized settings; all ranks call this.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: a model setting, or a size of the preset, differs from the checkpoint's.
    """
    if settings.get("init") is None:
        return dict(settings)
    initial, _ = open_checkpoint(Path(settings["init"]), notify, dist_ctx)
    model = initial.model.mapping()
    sizes = preset_sizes(settings["preset"]) if "preset" in settings else {}
    for name, value in {**sizes, **settings.get("model", {})}.items():
        if model.get(name) != value:
            given = f"model.{name}" if name in settings.get("model", {}) else "preset"
            raise ConfigError(f"{settings['init']} has model.{name} {model.get(name)}, not {value}: leave out {given}")
    return merge(settings, {"model": model})


def open_checkpoint(
    path: Path, notify: Callable[[str], None] = print, dist_ctx: DistributedContext = SINGLE_PROCESS
) -> tuple[Checkpoint, Tokenizer]:
    """Open a checkpoint with its tokenizer; only its weights are needed.

    The path is a checkpoint folder, or a run folder or its folder ``checkpoints``, whose newest checkpoint is opened.

    Raises:
        CheckpointError: the folder is neither, or holds no checkpoint with complete weights.
        DataError: the tokenizer cannot be read, or does not belong to the model.
    """
    opened: Checkpoint | None
    if (path / checkpoint.STATE_FILE).exists():
        opened = checkpoint.read(path, dist_ctx, weights_only=True)
    elif path.is_dir():
        opened = checkpoint.newest(path / CHECKPOINTS, notify, dist_ctx, weights_only=True)
        opened = opened or checkpoint.newest(path, notify, dist_ctx, weights_only=True)
        if opened is None:
            if (path / "model.safetensors").exists() or (path / "model.safetensors.index.json").exists():
                raise CheckpointError(
                    f"{path} is an exported model, not a run: antransformer import {quoted(path)} --out RUN makes a "
                    "run of it"
                )
            if (path / META_FILE).exists():
                raise CheckpointError(f"{path} is prepared data: give a run folder such as runs/angpt-nano")
            raise CheckpointError(
                f"{path} has no checkpoint: give a run folder such as runs/angpt-nano. compare and ablate keep "
                "checkpoints only of the longest runs with the first seed"
            )
    else:
        reason = (
            "a file, not the folder of a run or of a checkpoint"
            if path.exists()
            else "no such run or checkpoint folder"
        )
        raise CheckpointError(f"{path}: {reason}")
    tokenizer = Tokenizer.load(run_folder_of(opened) / TOKENIZER_FILE)
    if tokenizer.vocab_size > opened.model.vocab_size:
        raise DataError(
            f"{path}: its tokenizer has token ids outside the model's vocabulary of {opened.model.vocab_size}"
        )
    return opened, tokenizer


def run_folder_of(opened: Checkpoint) -> Path:
    """Run folder that contains a checkpoint."""
    return opened.path.resolve().parent.parent


def resume_command(folder: Path, dist_ctx: DistributedContext = SINGLE_PROCESS) -> str:
    """Return the command that resumes a run, on one machine with the same number of processes."""
    one_machine = dist_ctx.world_size == dist_ctx.local_world_size
    processes = f" --processes {dist_ctx.world_size}" if one_machine and dist_ctx.world_size > 1 else ""
    return f"antransformer train --out {quoted(folder)} --resume{processes}"
