"""Compare architectures fairly: the same effort of tuning, seeds, speedup with an interval, and a report.

Each architecture first searches its learning rate (--lr-trials) and one setting of its own (--tuning-trials) on the
same grid of factors around its default; then every budget is run to its end with every seed. The first architecture
is the baseline. If interrupted, run the same command again to continue; more --seeds or --budgets add the missing runs.

examples:
  antransformer compare --quick
  antransformer compare --data data/mine --preset nano --tokens 20M --architectures gpt+ ngpt angpt --seeds 3
  antransformer compare --budgets 5M 10M 20M 40M --architectures gpt+ angpt --devices cuda:0 cuda:1
"""

import argparse
from pathlib import Path

from antransformer.cli.common import check_folder, open_data
from antransformer.cli.options import Parser, add_config, number, settings_of
from antransformer.cli.progress import ExperimentProgress
from antransformer.comparison import report
from antransformer.comparison.compare import QUICK, QUICK_BUDGETS, budgets_of, plan
from antransformer.comparison.experiment import Experiment, Plan
from antransformer.comparison.summary import summary
from antransformer.extras import require
from antransformer.models import ModelConfig, registry
from antransformer.results.comparison import Results
from antransformer.runs.queue import RunQueue, default_devices
from antransformer.settings import Count, convert
from antransformer.training.config import TrainConfig, normalize_settings
from antransformer.training.device import choose_device
from antransformer.training.lock import lock

USAGE = "antransformer compare [options]"

# What all runs of an experiment share; the rest is each one's own, or the experiment's business.
COMMON = (
    "data",
    "preset",
    "batch_tokens",
    "micro_batch_size",
    "optimizer",
    "lr_width",
    "min_lr_ratio",
    "beta1",
    "beta2",
    "adam_eps",
    "grad_clip",
    "eval_tokens",
    "precision",
    "compile",
)
SIZES = ("width", "layers", "context", "head_dim", "mlp_ratio", "vocab_size", "rotary_fraction", "rope_theta")


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--architectures",
        nargs="+",
        metavar="NAME",
        help=f"two or more of {', '.join(registry.names())}, or one with the suffix -muon, such as angpt-muon, "
        "trained with Muon; the first is the baseline (default gpt+ angpt)",
    )
    parser.add_argument(
        "--tokens", metavar="TOKENS", help="the longest budget; a quarter and a half of it are run too (default 8M)"
    )
    parser.add_argument("--budgets", nargs="+", metavar="TOKENS", help="the budgets, in place of --tokens")
    parser.add_argument("--quick", action="store_true", help="a size and budgets for 18 minutes on two CPU cores")
    parser.add_argument(
        "--tuning-trials",
        metavar="N",
        help="the same for one more setting of each: weight decay of gpt+, gpt and ln-scaling, or with Muon their "
        "init_std, s_scale of angpt and ngpt, dyt_alpha_init of dyt, each 3 times the one before (default 3; with "
        "--quick 1)",
    )
    add_experiment_arguments(parser, lr_trials=3)


def add_experiment_arguments(parser: Parser, lr_trials: int) -> None:
    """Options of every verb that runs an experiment."""
    parser.add_argument("--seeds", metavar="N", help="measured seeds a budget; trials have their own (default 3)")
    parser.add_argument(
        "--lr-trials",
        metavar="N",
        help="learning rates to try, each twice the one before, and with Muon then as many of its own; 1 keeps the "
        "default; a best one at the edge extends the grid, and a third and three times the best are tried at last "
        f"(default {lr_trials})",
    )
    parser.add_argument("--trial-tokens", metavar="TOKENS", help="budget of the trials (default: the middle budget)")
    add_queue_arguments(parser)
    add_config(parser, TrainConfig, only=COMMON)
    group = parser.add_argument_group("sizes", "to change what the preset says, for all variants")
    add_config(group, ModelConfig, prefix="model.", only=SIZES)


def add_queue_arguments(parser: Parser) -> None:
    """Where runs go, and how many at a time."""
    parser.add_argument("--devices", nargs="+", metavar="NAME", help="one worker for each device named, such as cuda:0")
    parser.add_argument("--workers", metavar="N", help="runs at a time (default: one a GPU, or one a core)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs and the report")


def run(parsed: argparse.Namespace) -> None:
    """Plan, run, report."""
    given = normalize_settings(settings_of(parsed), "command line")
    settings = {**QUICK, **given} if parsed.quick else given
    tokens = convert(parsed.tokens or "8M", Count, "--tokens")
    budgets = budgets_of(tokens, parsed.budgets or (QUICK_BUDGETS if parsed.quick and not parsed.tokens else ()))
    planned = plan(
        settings,
        parsed.architectures or ["gpt+", "angpt"],
        budgets,
        **effort(parsed, lr_trials=3, tuning_trials=1 if parsed.quick else 3),
    )
    name = "quick" if parsed.quick else planned.common.get("preset", "nano")
    execute(planned, parsed, parsed.out or Path("runs") / f"compare-{name}")


def execute(planned: Plan, parsed: argparse.Namespace, folder: Path) -> Results:
    """Run a plan with its progress on the terminal, and write its report."""
    require("scipy", "analysis")
    check_folder(folder)
    devices = devices_of(parsed)
    dataset = open_data(planned.common.get("data", "python-stdlib"))
    progress = ExperimentProgress()
    experiment = Experiment(planned, dataset, RunQueue(folder / "runs", dataset, devices, progress), progress.stage)
    with lock(folder):
        with progress:
            results = experiment.run()
        results.save(folder)
        written = report.write(results, folder)
    print(f"\n{summary(results)}\n")
    print(f"report: {written[0]}")
    return results


def devices_of(parsed: argparse.Namespace) -> list[str]:
    """One entry a worker.

    Raises:
        ConfigError: there is no such device.
    """
    devices = parsed.devices or default_devices(number(parsed, "workers", None))
    for device in devices:
        choose_device(device)
    return devices


def effort(parsed: argparse.Namespace, **defaults: int) -> dict[str, int]:
    """How much to run, as ``Plan`` takes it."""
    values = {name: number(parsed, name, default) for name, default in {"seeds": 3, **defaults}.items()}
    return values | {"trial_tokens": convert(parsed.trial_tokens or 0, Count, "--trial-tokens")}
