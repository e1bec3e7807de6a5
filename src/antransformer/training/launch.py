"""Start or resume a training run: settings, data and run folder first, then the trainer under the folder's lock."""

import contextlib
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from antransformer.data import Dataset
from antransformer.data.mixture import open_mixture
from antransformer.data.mixture_spec import absolute, absolute_mixture, absolute_stage
from antransformer.errors import CheckpointError, ConfigError, DataError, DivergedError, RunStoppedError, WriteError
from antransformer.lock import lock
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.settings import Count, Words
from antransformer.training import defaults, extension, run_folder
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import TrainConfig, resolve_config, round_to_sequences
from antransformer.training.data import epochs_note
from antransformer.training.device import choose_device, resolve_auto
from antransformer.training.distributed.launcher import job_number
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext, init_distributed
from antransformer.training.learning_rates import format_rates
from antransformer.training.micro_batch import fit_micro_batch
from antransformer.training.profiling import FIRST, LAST, profile_steps
from antransformer.training.trackers import check_trackers
from antransformer.training.trainer import Reporter, Result, Trainer
from antransformer.wording import counted

LOG = logging.getLogger(__name__)
OpenData = Callable[[str, bool], Dataset]  # name, and whether to read and verify all of its files
OpenReporter = Callable[[TrainConfig, int], AbstractContextManager[Reporter]]


def is_restart(folder: Path | None) -> bool:
    """Return whether ``torchrun --max-restarts`` may have started this run before.

    torchrun repeats the arguments of the first start, so a restart must resume without being told to.

    Raises:
        ConfigError: no run folder is given, so that each start would create a new run.
    """
    if not job_number("TORCHELASTIC_MAX_RESTARTS", 0):
        return False
    if folder is None:
        raise ConfigError("torchrun --max-restarts resumes from the run folder: give it with --out")
    return (folder / run_folder.CONFIG_FILE).is_file()


def train(
    settings: dict[str, Any],
    folder: Path | None,
    open_data: OpenData,
    open_reporter: OpenReporter,
    *,
    resume: bool = False,
    rewarm: float | None = None,
    profile: bool = False,
) -> tuple[Path, Result]:
    """Train one run to its end, on one device or as one rank of many.

    Args:
        settings: normalized user settings.
        folder: run folder; None selects the first free ``runs/ARCHITECTURE-PRESET``.
        open_data: returns the dataset of a name or path; on most ranks without verifying its files.
        open_reporter: returns the reporter of this rank, given the config and the rank.
        resume: continue the run in ``folder`` from its latest checkpoint. More tokens than it has extend the run. A
            restart by torchrun resumes in any case.
        rewarm: fraction of the added steps over which the learning rate of an extended run rises to its peak.
        profile: write a trace of steps ``FIRST`` to ``LAST`` to ``profile.json`` in the run folder.

    Returns:
        Run folder and final losses.

    Raises:
        ConfigError, CheckpointError, DataError: wrong settings, an unusable run folder or unusable data.
        RunStoppedError, DivergedError, WriteError: the run ended early; raised on all ranks.
    """
    with init_distributed() as dist_ctx, contextlib.ExitStack() as held:
        # All ranks look before one of them creates the run, and one that sees it decides for all: on another node the
        # cache of a network file system may hide it.
        resume = any(dist_ctx.gather_or_raise(lambda: resume or is_restart(folder)))
        if not resume:
            notify = LOG.warning if dist_ctx.rank == 0 else LOG.debug
            settings = run_folder.with_initial_model(settings, notify, dist_ctx)
        # One rank of each node verifies the data, which may be a copy on its disk.
        open_verified = partial(_open, open_data, dist_ctx.local_rank == 0)
        with dist_ctx.rank_0_first():
            if resume:
                # Before the checkpoint is read: a process that is about to end may still write one.
                if dist_ctx.rank == 0 and folder is not None and (folder / run_folder.CONFIG_FILE).is_file():
                    held.enter_context(lock(folder))
                dataset, saved, folder = _resumed_run(settings, folder, open_verified, rewarm)
            else:
                dataset, saved, folder = new_run(settings, folder, open_verified, dist_ctx)
            if dist_ctx.rank == 0:
                check_trackers(saved)
        # Chosen by one rank: another process may create the default folder between two looks at it.
        chosen = folder
        folder = dist_ctx.gather_or_raise(lambda: chosen)[0]
        if not resume and "micro_batch_size" not in settings:
            saved = fit_micro_batch(saved, dist_ctx)
        config = saved
        if resume and settings.get("tokens", 0) > saved.tokens:
            config = _extended(saved, settings["tokens"], rewarm, folder, dist_ctx)
        with open_reporter(config, dist_ctx.rank) as reporter:
            trainer = Trainer(config, dataset, folder, reporter, resume, dist_ctx)
            if profile:
                _require_steps_to_trace(config.steps - trainer.done)
            with dist_ctx.rank_0_first():
                if dist_ctx.rank == 0 and not resume:
                    held.enter_context(lock(folder))
                    run_folder.create_run_folder(folder, config, dataset)
                # Changed settings are kept for the next --resume. A config without changes stays as it was written.
                if dist_ctx.rank == 0 and resume and config != run_folder.saved_config(folder):
                    run_folder.save_config(folder, config)
            if config is not saved:
                reporter.log(extension.describe(config, trainer.done))
            if trainer.done == config.steps:
                reporter.log(extension.describe_finished(config, folder, dist_ctx))
            else:
                reporter.log(_description(trainer, dataset, dist_ctx))
                if dist_ctx.rank == 0 and (note := disk_note(trainer)):
                    reporter.log(note)
            traced = profile and dist_ctx.rank == 0
            try:
                return folder, trainer.run(profile_steps(folder / "profile.json", reporter.log) if traced else None)
            except (DivergedError, RunStoppedError, WriteError) as error:
                # The first exit ends all ranks: let rank 0 close its trackers before. All ranks raise these errors,
                # except after a second signal.
                if not (isinstance(error, RunStoppedError) and error.at_once):
                    dist_ctx.barrier()
                raise


def _open(open_data: OpenData, verify: bool, name: str) -> Dataset:
    return open_data(name, verify)


def new_run(
    settings: dict[str, Any],
    folder: Path | None,
    open_data: Callable[[str], Dataset],
    dist_ctx: DistributedContext = SINGLE_PROCESS,
) -> tuple[Dataset, TrainConfig, Path]:
    """Data, complete settings and folder of a new run; raises the errors of ``train``."""
    # Checked before the data is prepared or verified: a misspelt setting should not cost a minute.
    planned = resolve_config(settings, vocab_size=PAPER_VOCABULARY)
    extension.require_no_rewarm(planned)
    # With the local rank, since every rank would otherwise open a context on the first GPU.
    choose_device(planned.device, dist_ctx.local_rank, dist_ctx.local_world_size)
    if folder is not None:
        run_folder.require_empty(folder)
    dataset = open_mixture(planned.data, planned.data_from, open_data)
    config = resolve_config(settings, dataset.vocab_size)
    config = _with_absolute_paths(resolve_auto(config, config.device))
    return dataset, config, folder or run_folder.default_folder(config)


def _resumed_run(
    settings: dict[str, Any], folder: Path | None, open_data: Callable[[str], Dataset], rewarm: float | None
) -> tuple[Dataset, TrainConfig, Path]:
    if folder is None:
        raise CheckpointError("a run to resume needs its folder: give it with out (--out)")
    others = {name: value for name, value in settings.items() if name != "tokens"}
    config = run_folder.resumed_config(folder, others)
    extension.check_length(config, settings.get("tokens", config.tokens), rewarm, folder)

    def open_source(name: str) -> Dataset:
        if not settings.keys() & {"data", "data_from"} and Path(name).is_absolute() and not Path(name).exists():
            raise DataError(f"{name}: no such folder, but {folder} was trained on it: give its new path with --data")
        return open_data(name)

    dataset = open_mixture(config.data, config.data_from, open_source)
    if not run_folder.has_started(folder):  # a checkpoint has the digest of the data, which the trainer compares
        run_folder.require_same_tokenizer(folder, dataset)
    return dataset, _with_absolute_paths(config), folder


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Config of a run that can be resumed in another working directory."""
    return replace(
        config,
        data=Words(absolute_mixture(config.data)),
        data_from=config.data_from and Words(absolute_stage(config.data_from)),
        init=config.init and absolute(config.init),
    )


def _extended(
    config: TrainConfig, tokens: Count, rewarm: float | None, folder: Path, dist_ctx: DistributedContext
) -> TrainConfig:
    # The trainer reports damaged checkpoints when it loads one.
    newest = checkpoint.newest(folder / run_folder.CHECKPOINTS, lambda _: None, dist_ctx)
    with dist_ctx.rank_0_first():
        return extension.extend(config, tokens, 0 if newest is None else newest.step, rewarm, folder)


def _require_steps_to_trace(left: int) -> None:
    if left < FIRST:
        raise ConfigError(
            f"--profile traces steps {FIRST} to {LAST}, and the run has {counted(left, 'step')} left: omit it, or "
            "raise tokens"
        )


def _description(trainer: Trainer, dataset: Dataset, dist_ctx: DistributedContext) -> str:
    """Architecture, size, length, epochs, learning rates, devices and folder of a run, in one line."""
    config = trainer.config
    tensor_parallel = f", tensor parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
    others, size = dist_ctx.world_size - 1, config.micro_batch_size
    accumulated = size < config.batch_size // trainer.dist_ctx.data_parallel_size
    micro_batches = f" in micro-batches of {counted(size, 'sequence')}" if accumulated else ""
    parallelism = f" and {others} more, {config.parallel}{tensor_parallel}" if others else ""
    return (
        f"{config.model.architecture}, {trainer.model.parameter_count() / 1e6:.2f}M parameters, "
        f"{counted(config.steps, 'step')} of {config.batch_tokens:,} tokens{micro_batches}"
        f"{epochs_note(config, dataset)}, learning rate {format_rates(config)}, on {trainer.device}{parallelism}"
        f"{law_note(config)}; run folder {trainer.folder}"
    )


def disk_note(trainer: Trainer) -> str:
    """Warning that the disk may be full before the end of a run; empty if it has space for all checkpoints it keeps.

    A checkpoint has float32 weights, up to two moments of them, and the averaged weights. One more than is kept has
    to fit, since the oldest is deleted when the newest is complete.
    """
    config, folder = trainer.config, trainer.folder
    size = trainer.model.parameter_count() * 4 * (4 if config.ema else 3)
    number = config.keep_checkpoints + 1 - len(checkpoint.step_folders(folder / run_folder.CHECKPOINTS))
    disk = shutil.disk_usage(folder)
    if disk.free >= number * size or not disk.total:  # some file systems do not know their size
        return ""
    return (
        f"warning: {counted(number, 'checkpoint')} of up to {size / 2**30:.3g} GiB may not fit into the "
        f"{disk.free / 2**30:.3g} GiB that are free for {folder}: free some space, or lower keep_checkpoints"
    )


def law_note(config: TrainConfig) -> str:
    """Size for which the paper's laws gave batch and learning rate, where it is not the size of the model."""
    model = config.model
    if model.vocab_size == PAPER_VOCABULARY or defaults.fitted_size(model, strict=False) is None:
        return ""
    by_law = {
        "batch": config.batch_tokens == round_to_sequences(defaults.batch_tokens(model), model.context),
        "learning rate": config.lr == defaults.learning_rate(model),
    }
    names = " and ".join(name for name, equal in by_law.items() if equal)
    size = f"{defaults.paper_size(model) / 1e6:.1f}M parameters, the size with a vocabulary of {PAPER_VOCABULARY:,}"
    return f"; {names} by the paper's laws for {size}" if names else ""
