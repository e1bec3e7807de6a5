"""Train a model on prepared data.

Without options: anGPT, size nano, on the source of Python's standard library. Settings come from the defaults of the
size (--preset), a YAML file (--config) and the options below; later ones override earlier ones.

examples:
  antransformer train
  antransformer train --data data/mine --preset 125m --recipe paper --tokens 2.5B --batch-tokens 0.5M
  antransformer train --data data/web:0.7 data/code:0.3 --data-from 0.8 data/web:0.5 data/code:0.5
  antransformer train --out runs/angpt-nano --resume
  antransformer train --out runs/angpt-nano --resume --tokens 50M --rewarm 0.1
  antransformer train --preset 32m --tokens 20K --batch-tokens 2048 --profile
  antransformer train --init runs/angpt-nano --data data/other --tokens 1M --lr 1e-3
  antransformer train --processes 8 --data data/mine --preset 0.5b --recipe paper --parallel fsdp
  torchrun --nproc-per-node 8 -m antransformer train --data data/mine --parallel fsdp --tensor-parallel 2
  torchrun --nproc-per-node 8 --max-restarts 9 -m antransformer train --data data/mine --parallel fsdp --out runs/mine

Use torchrun instead of --processes for several machines, or for automatic restarts: with torchrun --max-restarts, a run
that loses a process continues from its latest checkpoint. torchrun adds its own traceback to an error message.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser, add_config, number, settings_of
from antransformer.cli.tables import TableConsole, new_table
from antransformer.errors import ConfigError, DivergedError, RunStoppedError, WriteError
from antransformer.files import quoted
from antransformer.models.config import ModelConfig
from antransformer.training.config import ALIASES, TrainConfig
from antransformer.training.config_files import shipped_configs
from antransformer.training.distributed.launcher import job_number, launch

USAGE = "antransformer train [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``train``, with one for each field of ``TrainConfig`` and ``ModelConfig``."""
    shipped = ", ".join(shipped_configs())
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of settings, or a shipped config: {shipped}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/ARCHITECTURE-PRESET)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its latest checkpoint")
    parser.add_argument(
        "--rewarm",
        metavar="X",
        help="with --resume and more --tokens: fraction of the added steps over which the learning rate rises to its "
        "peak again. Required if it has begun to decay",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print all settings with their origins, parameters, memory and expected time, and exit",
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        help="number of processes on this machine, one for each GPU, instead of torchrun (default 1)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few steps to the run folder, and print the ten most expensive operations",
    )
    add_config(parser, ModelConfig, only=ALIASES)
    add_config(parser, TrainConfig)
    group = parser.add_argument_group("model settings", "override the preset, or choose what the paper leaves open")
    add_config(group, ModelConfig, prefix="model.", same_as=ALIASES)


def run(parsed: argparse.Namespace) -> None:
    """Train, print the final losses, and draw the loss curve if matplotlib is installed."""
    from antransformer.reporting.loss_curve import has_losses, loss_curve

    if parsed.dry_run:
        return show_preview(parsed)
    processes = number(parsed, "processes", 1)
    if processes > 1 and "RANK" not in os.environ:
        return launch(parsed.words, processes)
    if processes > 1 and processes != job_number("WORLD_SIZE", 1):
        raise ConfigError(f"--processes {processes} and torchrun exclude each other: omit --processes")
    is_rank_0 = job_number("RANK", 0) == 0
    try:
        trained = antransformer.train(
            config=parsed.config,
            out=parsed.out,
            resume=parsed.resume,
            rewarm=parsed.rewarm,
            profile=parsed.profile,
            progress=True,
            **settings_of(parsed),
        )
    except (RunStoppedError, DivergedError, WriteError) as error:
        if is_rank_0:
            raise
        # All ranks raise the same error, and one message is enough.
        raise SystemExit(error.status if isinstance(error, RunStoppedError) else 1) from error
    if is_rank_0:
        result = trained.result
        print(
            f"validation loss {result.val_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte; "
            f"{result.tokens_per_second:,.0f} tokens/s; checkpoint {result.checkpoint}"
        )
        for name, loss in result.val_loss_by_source.items():
            print(f"  {name}: validation loss {loss:.4f}")
        if find_spec("matplotlib") and has_losses(trained.folder):
            print(f"loss curve: {loss_curve(trained.folder)}")
        print(f"next: antransformer generate --checkpoint {quoted(trained.folder)}")


def show_preview(parsed: argparse.Namespace) -> None:
    """Print what the run would be.

    Raises:
        ConfigError: the run would be resumed, or is one of several processes.
    """
    from antransformer.api.training import preview

    if parsed.resume or parsed.rewarm or parsed.profile or parsed.processes or "RANK" in os.environ:
        raise ConfigError(
            "--dry-run shows a new run in one process: omit --resume, --rewarm, --profile, --processes and torchrun"
        )
    shown = preview(config=parsed.config, progress=True, **settings_of(parsed))
    table = new_table("setting", "value", "origin")
    for setting in shown.settings:
        table.add_row(setting.name, str(setting.value), setting.origin)
    TableConsole().print(table)
    if shown.seconds_per_step is None or shown.seconds is None:
        time = f"{shown.free / 2**30:.2f} GiB are free, so no step was timed: lower --micro-batch-size"
    else:
        hours = f"{shown.seconds / 3600:,.2f} hours" if shown.seconds > 360 else f"{shown.seconds:.0f} seconds"
        time = f"{shown.seconds_per_step:.3f} s a step, {hours} without validation"
    print(f"{shown.parameters / 1e6:.2f}M parameters{shown.epochs}; {shown.memory / 2**30:.2f} GiB for a step; {time}")
