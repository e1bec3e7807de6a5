"""Search the best learning rate and batch of every size: the grid search under scaling laws.

Every architecture, size, number of tokens and batch has its own grid of learning rates, in factors of 10^(1/3) around
the default, which goes on while the best lies at an edge. How many runs, tokens and hours that makes on this machine is
measured and shown first, and past an hour it only starts with --yes. The same command goes on where a killed sweep was,
and one with other batches, tokens or learning rates adds to what its folder holds. The laws come from
'antransformer fit' with the sweep's folder.

With --widths the depth, the batch and the tokens are the same for all, and the report shows whether the best learning
rate moves with the width, and how activations do.

examples:
  antransformer sweep --data data/mine --architecture angpt --sizes nano 32m 62m --batch-tokens 32K 64K 128K --yes
  antransformer sweep --sizes pico nano --architectures gpt+ angpt --tokens-per-param 5 10 20
  antransformer sweep --widths 64 128 256 512 --architectures gpt+ ngpt angpt --tokens 1M
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antransformer.cli.common import DEFAULT_DATA, check_folder, open_data
from antransformer.cli.compare import COMMON, SIZES, add_queue_arguments, devices_of
from antransformer.cli.options import Parser, add_config, number, settings_of
from antransformer.cli.progress import ExperimentProgress, log
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.extras import require
from antransformer.models import PRESETS, ModelConfig, registry
from antransformer.models.config import preset_sizes
from antransformer.results import comparison as results
from antransformer.results import sweep as sweep_results
from antransformer.runs.queue import RunQueue
from antransformer.settings import Count, convert
from antransformer.sweeps import report as sweep_report
from antransformer.sweeps.estimate import Estimate, estimate
from antransformer.sweeps.sweep import Sweeper, SweepPlan, plan
from antransformer.training.config import TrainConfig, normalize_settings
from antransformer.training.defaults import TOKENS_PER_PARAMETER
from antransformer.training.lock import lock

USAGE = "antransformer sweep [options]"
WIDTH_TOKENS = 2_000_000  # of every run where only the width differs
UNASKED_HOURS = 1.0


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--architectures",
        "--architecture",
        nargs="+",
        default=["angpt"],
        metavar="NAME",
        help=f"one or more of {', '.join(registry.names())} (default angpt)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["nano"],
        metavar="NAME",
        help=f"one or more of {', '.join(PRESETS)}, all with the longest context among them (default nano)",
    )
    parser.add_argument("--widths", nargs="+", default=(), metavar="N", help="widths in place of that of the size")
    parser.add_argument(
        "--batch-tokens",
        nargs="+",
        default=(),
        metavar="TOKENS",
        help="tokens of a step, each tried (default: one, by the first architecture and the size)",
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        default=["auto"],
        metavar="X",
        help="auto, or the learning rates to try, and no others (default auto)",
    )
    parser.add_argument(
        "--lr-trials", metavar="N", help="learning rates of the grid, before it is extended (default 5)"
    )
    parser.add_argument(
        "--tokens-per-param",
        nargs="+",
        default=(),
        metavar="X",
        help="tokens of a run for each parameter, each a run of its own; several, such as 5 10 20, are what L(N, D) "
        f"is fitted to (default {TOKENS_PER_PARAMETER}, without --widths)",
    )
    parser.add_argument(
        "--tokens", nargs="+", default=(), metavar="TOKENS", help="the same for all sizes (default with --widths 2M)"
    )
    parser.add_argument("--seeds", metavar="N", help="runs at each point of the grid (default 1)")
    parser.add_argument("--yes", action="store_true", help="start also what takes more than an hour")
    add_queue_arguments(parser)
    add_config(parser, TrainConfig, only=tuple(name for name in COMMON if name not in ("preset", "batch_tokens")))
    group = parser.add_argument_group("sizes", "to change what the presets say, for all runs")
    add_config(group, ModelConfig, prefix="model.", only=tuple(name for name in SIZES if name != "width"))


def run(parsed: argparse.Namespace) -> None:
    """Plan, estimate, run, report."""
    require("scipy", "analysis")
    settings = normalize_settings(settings_of(parsed), "command line")
    folder = parsed.out or Path("runs") / ("sweep-widths" if parsed.widths else "sweep")
    check_folder(folder)
    check_no_comparison(folder)
    choices = grid(parsed)
    devices = devices_of(parsed)
    dataset = open_data(settings.get("data", DEFAULT_DATA))
    planned = plan(settings, dataset.vocab_size, parsed.architectures, parsed.sizes, **choices)
    earlier = begun_before(folder, dataset, planned)
    progress = ExperimentProgress()
    sweeper = Sweeper(planned, dataset, RunQueue(folder / "runs", dataset, devices, progress), progress.stage)
    expected = estimate(sweeper, log)
    if expected.runs[1]:
        log(f"to do: {in_words(expected)}")
    if expected.hours[1] > UNASKED_HOURS and not parsed.yes:
        raise ConfigError(f"this takes up to {expected.hours[1]:.1f} hours on this machine: add --yes to start it")
    with lock(folder):
        with progress:
            swept = sweeper.run()
        if earlier:
            swept = swept.merged_with(earlier)
        swept.save(folder)
        written = sweep_report.write(swept, folder)
    print(f"\n{sweep_report.lead(swept)}\n")
    print(f"report: {written[0]}")
    print(f"laws: antransformer fit {folder}")


def check_no_comparison(folder: Path) -> None:
    """Refuse the folder of a comparison; raises ConfigError."""
    if (folder / results.FILE).exists():
        raise ConfigError(f"{folder} holds a comparison or an ablation: choose another --out")


def begun_before(folder: Path, dataset: Dataset, planned: SweepPlan) -> sweep_results.Sweep | None:
    """The sweep that the folder holds, which this one goes on with.

    Raises:
        ConfigError: it is one of other data or settings.
        DataError: what it holds is damaged.
    """
    if not (folder / sweep_results.FILE).is_file():
        return None
    earlier = sweep_results.Sweep.load(folder)
    if earlier.setup.get("data_digest") != dataset.digest:
        raise ConfigError(f"{folder} holds a sweep of other data than {dataset.path}: choose another --out")
    before, now = earlier.setup.get("settings", {}), planned.shared
    for key in sorted({*before, *now}):
        was, wanted = (settings.get(key, "as by default") for settings in (before, now))
        if was != wanted:
            raise ConfigError(f"{folder} was made with {key} {was}, not {wanted}: choose another --out")
    return earlier


def grid(parsed: argparse.Namespace) -> dict[str, Any]:
    """What is tried, as ``plan`` takes it.

    Raises:
        ConfigError: a size is unknown, a value is none of its kind, or two options exclude each other.
    """
    for name in parsed.sizes:  # before minutes go into the default data
        preset_sizes(name)
    lrs = () if list(parsed.lrs) == ["auto"] else positive("--lrs", parsed.lrs, float)
    tokens = positive("--tokens", parsed.tokens, Count)
    ratios = positive("--tokens-per-param", parsed.tokens_per_param, float)
    if tokens and ratios:
        raise ConfigError("give --tokens or --tokens-per-param, not both")
    if lrs and parsed.lr_trials:
        raise ConfigError("--lr-trials is for --lrs auto: leave it out, or name no learning rates")
    if not tokens and not ratios:
        tokens, ratios = ([WIDTH_TOKENS], []) if parsed.widths else ([], [TOKENS_PER_PARAMETER])
    return {
        "widths": positive("--widths", parsed.widths, int),
        "batches": positive("--batch-tokens", parsed.batch_tokens, Count),
        "lrs": lrs,
        "tokens": tokens,
        "ratios": ratios,
        "trials": number(parsed, "lr_trials", 5),
        "seeds": number(parsed, "seeds", 1),
    }


def positive(option: str, values: Sequence[str], kind: type) -> list[Any]:
    """The values of an option as numbers above 0.

    Raises:
        ConfigError: one is none.
    """
    found = [convert(value, kind, option) for value in values]
    if any(value <= 0 for value in found):
        raise ConfigError(f"{option} must be above 0, got {' '.join(values)}")
    return found


def in_words(expected: Estimate) -> str:
    """How much is to be done, for a line."""
    least, most = (
        f"{runs:,} runs, {tokens / 1e6:,.1f}M tokens, {duration(hours)}"
        for runs, tokens, hours in zip(expected.runs, expected.tokens, expected.hours, strict=True)
    )
    return least if least == most else f"{least}; up to {most} where the best lie at the edges"


def duration(hours: float) -> str:
    """To be read before a decision."""
    return f"about {hours:.1f} hours" if hours >= UNASKED_HOURS else f"about {math.ceil(60 * hours)} minutes"
