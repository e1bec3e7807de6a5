"""The run folder: one folder holds everything that a run reads when it goes on and leaves when it ends.

config.yaml      the complete settings
tokenizer.json   of the data
metrics.jsonl    one line a logged step
checkpoints/     see training/checkpoint.py
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from antransformer.data import Dataset, Tokenizer
from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.files import replace_text
from antransformer.renamed import upgrade_settings
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.config import (
    LEGACY_DEFAULTS,
    MUTABLE_ON_RESUME,
    TrainConfig,
    merge,
    normalize_settings,
    read_yaml,
    resolve_config,
    to_mapping,
    whole_sequences,
)
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext
from antransformer.training.lock import LOCK_FILE

CONFIG_FILE = "config.yaml"
CONFIG_VERSION = 2
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS = "checkpoints"


def default_folder(config: TrainConfig, root: Path = Path("runs")) -> Path:
    """``runs/angpt-nano``, or with the first free number behind it."""
    name = f"{config.model.architecture}-{config.preset}"
    candidates = (root / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(folder for folder in candidates if not folder.exists())


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose the name of a new folder for --out")
    # What a run leaves that was killed while it laid out its folder; its config comes last.
    unfinished = {CHECKPOINTS, TOKENIZER_FILE, f"{TOKENIZER_FILE}.partial", f"{CONFIG_FILE}.partial", LOCK_FILE}
    begun = {path.name for path in folder.iterdir()}
    if begun - unfinished or any((folder / CHECKPOINTS).glob("*")):
        raise ConfigError(f"{folder} is not empty: choose another --out, or --resume to go on with the run in it")


def create_run_folder(folder: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Lay out the folder of a new run; raises as ``lay_out``."""
    write_run_folder(folder, to_mapping(config), dataset.tokenizer())


def write_run_folder(folder: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Make a run folder without a checkpoint.

    Raises:
        ConfigError: the folder exists and is not empty, or can not be made.
    """
    require_empty(folder)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} can not be made: {error.strerror}; choose another --out") from error
    tokenizer.save(folder / TOKENIZER_FILE)
    # Last, so that a folder with a config is complete.
    content = {"version": CONFIG_VERSION, **settings}
    replace_text(folder / CONFIG_FILE, yaml.safe_dump(content, sort_keys=False))


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in ``folder``.

    Raises:
        CheckpointError: there is no run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no run to resume ({CONFIG_FILE} is missing)")
    settings = read_yaml(folder / CONFIG_FILE)
    version = settings.pop("version", 1)
    if version not in (1, CONFIG_VERSION):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: version {version!r}, this release reads {CONFIG_VERSION}: update antransformer"
        )
    return upgrade_settings(settings) if version == 1 else settings


def saved_config(folder: Path) -> TrainConfig:
    """The config of the run in ``folder``, trained here; raises as ``saved_settings`` and ``resolve``."""
    settings = {**LEGACY_DEFAULTS, **saved_settings(folder)}
    return resolve_config(
        settings, vocab_size=1, where=str(folder / CONFIG_FILE)
    )  # the saved model has its own vocab_size


def resumed_config(folder: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The config of the run in ``folder``, with the operational settings among those given now.

    Raises:
        CheckpointError: a setting given now would change what the run computes.
        ConfigError: a setting is wrong.
    """
    saved = saved_settings(folder)
    model = saved.get("model")
    if not isinstance(model, dict) or "vocab_size" not in model:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not the complete config of a run: put it back as it was")
    if "tokens" not in saved:
        raise CheckpointError(
            f"{folder} holds imported weights and no run to resume: start one from them with --init {folder}"
        )
    complete = saved_config(folder)
    before = to_mapping(complete)
    now = normalize_settings(given, "command line")
    if "batch_tokens" in now:  # as given for a start, where it was rounded
        now["batch_tokens"] = whole_sequences(now["batch_tokens"], complete.model.context)
    changes = {key: (before.get(key), value) for key, value in now.items() if key not in (*MUTABLE_ON_RESUME, "model")}
    changes |= {f"model.{key}": (before["model"].get(key), value) for key, value in now.get("model", {}).items()}
    for key, (old, new) in changes.items():
        if old != new:
            raise CheckpointError(
                f"{folder} was trained with {key} {old}, not {new}: leave it out, or start a new run with another --out"
            )
    return resolve_config(
        {**before, **{key: value for key, value in now.items() if key in MUTABLE_ON_RESUME}}, vocab_size=1
    )


def with_initial_model(settings: Mapping[str, Any], notify: Callable[[str], None]) -> dict[str, Any]:
    """Normalised settings with the model of the checkpoint that ``init`` names, where it names one.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: a setting given is not that of the checkpoint's model.
    """
    if settings.get("init") is None:
        return dict(settings)
    found, _ = open_checkpoint(Path(settings["init"]), notify)
    model = found.model.mapping()
    for name, value in settings.get("model", {}).items():
        if model.get(name) != value:
            raise ConfigError(f"{settings['init']} has model.{name} {model.get(name)}, not {value}: leave it out")
    return merge(settings, {"model": model})


def open_checkpoint(
    path: Path, notify: Callable[[str], None] = print, dist_ctx: DistributedContext = SINGLE_PROCESS
) -> tuple[Checkpoint, Tokenizer]:
    """The checkpoint to use of a run folder (its newest whole one) or of a checkpoint folder, and its tokenizer.

    Raises:
        CheckpointError: the folder is neither, or holds no whole checkpoint.
        DataError: the tokenizer can not be read, or is not the model's.
    """
    if (path / checkpoint.STATE_FILE).exists():
        found = checkpoint.read(path, dist_ctx)
    elif path.is_dir():
        newest = checkpoint.newest(path / CHECKPOINTS, notify, dist_ctx)
        if newest is None:
            raise CheckpointError(f"{path}: no checkpoint in it; give a run folder such as runs/angpt-nano")
        found = newest
    else:
        raise CheckpointError(f"{path}: no such run or checkpoint folder")
    tokenizer = Tokenizer.load(run_folder_of(found) / TOKENIZER_FILE)
    if tokenizer.vocab_size > found.model.vocab_size:
        raise DataError(f"{path}: its tokenizer has ids beyond the model's vocabulary of {found.model.vocab_size}")
    return found, tokenizer


def run_folder_of(found: Checkpoint) -> Path:
    """The run folder that a checkpoint lies in."""
    return found.path.resolve().parent.parent
