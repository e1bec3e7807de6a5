"""Train a model on prepared data.

With no options: anGPT, size nano, on the source of Python's standard library. Settings come from the defaults of the
size (--preset), a YAML file (--config) and the options below, each winning over the ones before it.

examples:
  antransformer train
  antransformer train --data data/mine --preset 125m --tokens 2.5B --batch-tokens 0.5M --lr 2e-3
  antransformer train --out runs/angpt-nano --resume
  antransformer train --preset 32m --tokens 20K --batch-tokens 2048 --profile
  antransformer train --init runs/angpt-nano --data data/other --tokens 1M --lr 1e-3
  torchrun --nproc-per-node 8 -m antransformer train --data data/mine --preset 0.5b --parallel fsdp
  torchrun --nproc-per-node 8 -m antransformer train --data data/mine --preset 0.5b --parallel fsdp --tensor-parallel 2
  torchrun --nproc-per-node 8 --max-restarts 9 -m antransformer train --data data/mine --parallel fsdp --out runs/mine

Started again by torchrun --max-restarts, when a process was lost, a run goes on from its newest checkpoint.
"""

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from antransformer.cli.common import open_data
from antransformer.cli.options import Parser, add_config, settings_of
from antransformer.cli.progress import TrainingProgress
from antransformer.data import Dataset
from antransformer.errors import CheckpointError, ConfigError, DivergedError, RunStoppedError, WriteError
from antransformer.models import ModelConfig
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.training import run_folder as runs
from antransformer.training.config import ALIASES, TrainConfig, merge, normalize_settings, resolve_config
from antransformer.training.config_files import read_config, shipped_configs
from antransformer.training.distributed.parallel import DistributedContext, init_distributed
from antransformer.training.lock import lock
from antransformer.training.optimizer import format_lrs
from antransformer.training.profiling import FIRST, LAST, profile_steps
from antransformer.training.trainer import Result, Trainer

USAGE = "antransformer train [options]"


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    shipped = ", ".join(shipped_configs())
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of settings, or a shipped one by name: {shipped}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/ARCHITECTURE-PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out from its newest checkpoint")
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"write a trace of steps {FIRST} to {LAST} into the run folder, and print their ten dearest operations",
    )
    add_config(parser, ModelConfig, only=ALIASES)
    add_config(parser, TrainConfig)
    group = parser.add_argument_group("model settings", "to change what the preset says, or what the paper leaves open")
    add_config(group, ModelConfig, prefix="model.")


def run(parsed: argparse.Namespace) -> None:
    """Train, from the start or from a checkpoint."""
    settings = normalize_settings(settings_of(parsed), "command line")
    if parsed.config is not None:
        settings = merge(normalize_settings(read_config(parsed.config), parsed.config), settings)
    train(settings, parsed.out, parsed.resume or begun_before(parsed.out), parsed.profile)


def begun_before(folder: Path | None) -> bool:
    """Whether this may be one more start of a run by ``torchrun --max-restarts``, which repeats the arguments.

    Raises:
        ConfigError: without --out each start would be a new run.
    """
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return False
    if folder is None:
        raise ConfigError("torchrun --max-restarts goes on in the folder of the run: give it with --out")
    return (folder / runs.CONFIG_FILE).is_file()


def train(
    settings: dict[str, Any], folder: Path | None, resume: bool = False, profile: bool = False
) -> tuple[Path, Result]:
    """One run with its progress on the terminal, shown by the first process; returns its folder and how it ended."""
    with init_distributed() as dist_ctx:
        with dist_ctx.rank_0_first():
            dataset, config, folder = _resumed(settings, folder) if resume else _new(settings, folder)
        with TrainingProgress(config.steps, shown=dist_ctx.rank == 0) as progress:
            trainer = Trainer(config, dataset, folder, progress, resume, dist_ctx)
            if profile and config.steps - trainer.done < FIRST:
                raise ConfigError(
                    f"--profile traces steps {FIRST} to {LAST}, and {config.steps - trainer.done} are left to train: "
                    "leave it out, or give more --tokens"
                )
            with lock(folder) if dist_ctx.rank == 0 else contextlib.nullcontext():
                with dist_ctx.rank_0_first():
                    if not resume and dist_ctx.rank == 0:
                        runs.create_run_folder(folder, config, dataset)
                muon = "" if config.muon_lr is None else f" and Muon's {config.muon_lr:g}"
                progress.log(
                    f"{config.model.architecture}, {trainer.model.parameter_count() / 1e6:.2f}M parameters, "
                    f"{config.steps:,} steps of {config.batch_tokens:,} tokens, "
                    f"learning rate {format_lrs(config)}{muon}, "
                    f"on {trainer.device}{shared(config, dist_ctx)}; run folder {folder}"
                )
                try:
                    watched = profile and dist_ctx.rank == 0
                    result = trainer.run(profile_steps(folder / "profile.json", progress.log) if watched else None)
                except (RunStoppedError, DivergedError, WriteError) as error:  # which all processes come to together
                    if dist_ctx.rank == 0:
                        raise
                    raise SystemExit(1) from error
    if dist_ctx.rank == 0:
        print(
            f"validation loss {result.val_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte; "
            f"{result.tokens_per_second:,.0f} tokens/s; checkpoint {result.checkpoint}"
        )
        print(f"next: antransformer generate --checkpoint {folder}")
    return folder, result


def shared(config: TrainConfig, dist_ctx: DistributedContext) -> str:
    """In words, how many processes share the model."""
    split = f", tensor parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
    return f" and {dist_ctx.world_size - 1} more, {config.parallel}{split}" if dist_ctx.world_size > 1 else ""


def _new(settings: dict[str, Any], folder: Path | None) -> tuple[Dataset, TrainConfig, Path]:
    settings = runs.with_initial_model(settings, print)
    # Settings are checked before the data is prepared or verified: a misspelt option should not cost a minute.
    data = resolve_config(settings, vocab_size=PAPER_VOCABULARY).data
    if folder is not None:
        runs.require_empty(folder)
    dataset = open_data(data)
    config = resolve_config(settings, dataset.vocab_size)
    return dataset, config, folder or runs.default_folder(config)


def _resumed(settings: dict[str, Any], folder: Path | None) -> tuple[Dataset, TrainConfig, Path]:
    if folder is None:
        raise CheckpointError("--resume needs the run folder: give it with --out")
    config = runs.resumed_config(folder, settings)
    return open_data(config.data), config, folder
