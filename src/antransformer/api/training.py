"""Prepare data and train."""

import contextlib
import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from antransformer.api.arguments import checked
from antransformer.data import Dataset, prepare_tokenized
from antransformer.data import join_parts as join_written_parts
from antransformer.data import prepare as prepare_data
from antransformer.data import prepare_part as write_part
from antransformer.data import verify as verify_data
from antransformer.data.holdout import Inputs
from antransformer.data.readers import TEXT_FIELD
from antransformer.errors import ConfigError
from antransformer.progress import PrepareProgress, TrainingProgress, VerifyProgress, open_dataset
from antransformer.training import config_files, launch, run_folder
from antransformer.training.config import LEGACY_DEFAULTS, TrainConfig, merge, normalize_settings
from antransformer.training.dry_run import NullReporter
from antransformer.training.extension import read_rewarm
from antransformer.training.preview import Preview
from antransformer.training.preview import preview as preview_run
from antransformer.training.recipes import RECIPES
from antransformer.training.trainer import Reporter, Result

LOG = logging.getLogger(__name__)


@checked
def prepare(
    inputs: Inputs,
    out: str | Path,
    *,
    tokenizer: str | Path = "byte",
    tokenized: bool = False,
    bpe_vocab_size: int | None = None,
    end_of_text: str | None = None,
    text_field: str = TEXT_FIELD,
    val_fraction: float | None = None,
    val_inputs: Inputs = (),
    progress: bool = False,
) -> Dataset:
    """Tokenize text into a new data folder; arguments and errors as in ``antransformer.data.prepare``.

    With ``tokenized``, the inputs are files of token ids, as in ``antransformer.data.prepare_tokenized``.
    """
    with PrepareProgress(Path(out).name, enabled=progress) as display:
        if tokenized:
            if bpe_vocab_size is not None or text_field != TEXT_FIELD:
                raise ConfigError("bpe_vocab_size and text_field are for text, not with tokenized: omit them")
            return prepare_tokenized(
                [inputs] if isinstance(inputs, str | Path) else tuple(inputs),
                out,
                tokenizer=tokenizer,
                end_of_text=end_of_text,
                val_fraction=val_fraction,
                val_inputs=[val_inputs] if isinstance(val_inputs, str | Path) else tuple(val_inputs),
                progress=display,
            )
        return prepare_data(
            inputs,
            out,
            tokenizer=tokenizer,
            bpe_vocab_size=bpe_vocab_size,
            end_of_text=end_of_text,
            text_field=text_field,
            val_fraction=val_fraction,
            val_inputs=val_inputs,
            progress=display,
            notify=display.log,
        )


@checked
def preview(*, config: str | Path | None = None, progress: bool = False, **settings: Any) -> Preview:
    """Settings of a run with their origins, its parameters, memory and time; no run folder is created.

    Args:
        config: as in ``train``.
        settings: as in ``train``.
        progress: whether to show progress where data is prepared and steps are timed.

    Raises:
        ConfigError, DataError: wrong settings, or unusable data.
    """
    options = normalize_settings(settings, "settings")
    file = {} if config is None else _file_settings(str(config), options)
    settings = run_folder.with_initial_model(merge(file, options), LOG.warning)
    dataset, complete, _ = launch.new_run(settings, None, partial(open_dataset, progress=progress))
    log = partial(print, file=sys.stderr) if progress else LOG.info
    return preview_run(complete, dataset, options, file, None if config is None else str(config), log)


# Settings that every config of a run has, and hardly any other file.
OF_A_RUN = {"tokens", "batch_tokens", "micro_batch_size", "lr", "seed", "eval_every", "checkpoint_every", "device"}
# Options of train that are not settings of a run.
NOT_IN_A_FILE = {"config", "out", "resume", "rewarm", "processes", "profile"}


@checked
def prepare_part(
    inputs: Inputs,
    out: str | Path,
    part: str,
    *,
    tokenizer: str | Path = "byte",
    end_of_text: str | None = None,
    text_field: str = TEXT_FIELD,
    val_fraction: float | None = None,
    val_inputs: Inputs = (),
    progress: bool = False,
) -> Path | None:
    """Tokenize part "I/N" of the files; arguments, result and errors as in ``antransformer.data.prepare_part``."""
    with PrepareProgress(f"{Path(out).name} {part}", enabled=progress) as display:
        return write_part(
            inputs,
            out,
            part,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
            text_field=text_field,
            val_fraction=val_fraction,
            val_inputs=val_inputs,
            progress=display,
        )


@checked
def join_parts(out: str | Path, *, progress: bool = False) -> Dataset:
    """Join the parts of ``out`` to a data folder; errors as in ``antransformer.data.join_parts``."""
    with PrepareProgress(Path(out).name, enabled=progress) as display:
        return join_written_parts(out, progress=display)


@checked
def verify(data: str | Path, *, jobs: int = 1, progress: bool = False) -> Dataset:
    """Check every shard of a ``data`` folder, ``jobs`` at a time; errors as in ``antransformer.data.verify``.

    With ``progress``, the bytes that were checked are shown on standard error.
    """
    with VerifyProgress(Path(data).name, enabled=progress) as display:
        return verify_data(data, jobs=jobs, progress=display)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: run folder.
        result: validation loss, bits per byte, tokens per second and last checkpoint.
    """

    folder: Path
    result: Result


@checked
def train(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    rewarm: float | str | None = None,
    profile: bool = False,
    progress: bool | Reporter = False,
    **settings: Any,
) -> TrainedRun:
    """Train a model; under torchrun, as one rank of many. Seeds torch's global generator.

    Args:
        config: YAML file of settings, or the name of a shipped one; ``settings`` override it.
        out: run folder; by default the first free ``runs/ARCHITECTURE-PRESET``.
        resume: continue the run in ``out`` from its latest checkpoint. With more ``tokens`` than it has, extend it.
        rewarm: fraction of the added steps over which the learning rate of an extended run rises to its peak. It is
            required if the learning rate has begun to decay.
        profile: write a trace of a few steps to ``profile.json`` in the run folder.
        progress: whether to show progress, or an object that receives it.
        settings: fields of ``TrainConfig``, such as ``data``, ``preset``, ``tokens``, ``lr``, and ``model={...}``. A
            mixture is a list or one text: ``data=["web:0.7", "code:0.3"]``.

    Raises:
        ConfigError, CheckpointError, DataError: wrong settings, an unusable run folder or unusable data.
        RunStoppedError: SIGINT, SIGTERM or SIGHUP arrived, and a checkpoint was written.
        DivergedError, WriteError: the loss is not finite, or a checkpoint could not be written.
    """
    folder = None if out is None else Path(out)
    rewarm = None if rewarm is None else read_rewarm(rewarm, resume)
    checked = normalize_settings(settings, "settings")
    if config is not None:
        checked = merge(_file_settings(str(config), checked), checked)

    def open_data(name: str, verify: bool) -> Dataset:
        return open_dataset(name, progress=progress is True, verify=verify)

    def open_reporter(config: TrainConfig, rank: int) -> AbstractContextManager[Reporter]:
        if progress is True:
            return TrainingProgress(config.steps, enabled=rank == 0)
        return contextlib.nullcontext(NullReporter() if progress is False else progress)

    trained = launch.train(checked, folder, open_data, open_reporter, resume=resume, rewarm=rewarm, profile=profile)
    return TrainedRun(*trained)


def _file_settings(config: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the normalized settings of a config file.

    Raises:
        ConfigError: the file cannot be read or has an option that is not a setting, or it is the config of a run and
            the options name another recipe: every value of its own recipe would stay.
    """
    content = config_files.read_config(config)
    for name in NOT_IN_A_FILE & content.keys():
        raise ConfigError(f"{config}: {name} is not a setting: give it on the command line, as --{name}")
    file = normalize_settings(content, config)
    if file.keys() >= OF_A_RUN and "vocab_size" in file.get("model", {}):
        file = {**LEGACY_DEFAULTS, **file}  # a run of an older release lacks newer settings
    saved, recipe = file.get("recipe"), options.get("recipe")
    if saved and recipe in RECIPES and recipe != saved and RECIPES[recipe].keys() <= file.keys():
        raise ConfigError(f"{config} has all values of recipe {saved}: omit recipe {recipe}, or the file")
    return file
