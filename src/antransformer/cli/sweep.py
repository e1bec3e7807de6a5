"""Search the best learning rate and batch of every size.

Every architecture, size, number of tokens and batch has its own grid of learning rates. Rates are spaced by factors of
10^(1/3) around the default. A grid is extended while the best rate is at an edge. The sweep first times a few steps and
prints the number of runs, tokens and hours on this machine; more than an hour needs --yes. If interrupted, run the same
command again to continue. Other batches, tokens or learning rates add to the results in the folder. 'antransformer fit'
fits the laws.

With --widths, depth, batch and tokens are the same for all. The report then shows whether the best learning rate and
the size of the activations change with the width.

examples:
  antransformer sweep --data data/mine --architecture angpt --sizes nano 32m 62m --batch-tokens 32K 64K 128K --yes
  antransformer sweep --sizes pico nano --architectures gpt+ angpt --tokens-per-param 5 10 20
  antransformer sweep --widths 64 128 256 512 --architectures gpt+ ngpt angpt --tokens 1M
"""

import argparse
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser, add_config, add_queue_arguments, number, settings_of
from antransformer.files import quoted
from antransformer.models import registry
from antransformer.models.config import PRESETS, ModelConfig
from antransformer.runs import shared_settings
from antransformer.training.config import TrainConfig

USAGE = "antransformer sweep [options]"
HOURS_WITHOUT_YES = 1.0


def add_arguments(parser: Parser) -> None:
    """Add the options of ``sweep``: what to search, seeds, devices and shared settings."""
    parser.add_argument(
        "--architectures",
        "--architecture",
        nargs="+",
        default=("angpt",),
        metavar="NAME",
        help=f"one or more of {', '.join(registry.names())} (default angpt)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=("nano",),
        metavar="NAME",
        help=f"one or more of {', '.join(PRESETS)}; all get the longest context among them (default nano)",
    )
    parser.add_argument("--widths", nargs="+", default=(), metavar="N", help="widths, instead of the width of the size")
    parser.add_argument(
        "--batch-tokens",
        nargs="+",
        default=(),
        metavar="TOKENS",
        help="tokens per step to try (default: one value, chosen by the first architecture and the size)",
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        default=("auto",),
        metavar="X",
        help="auto, or the exact learning rates to try (default auto)",
    )
    parser.add_argument("--lr-trials", metavar="N", help="initial number of learning rates in the grid (default 5)")
    parser.add_argument(
        "--tokens-per-param",
        nargs="+",
        default=(),
        metavar="X",
        help="lengths of the runs in tokens per parameter (default 20, except with --widths). L(N, D) needs several, "
        "such as 5 10 20",
    )
    parser.add_argument(
        "--tokens", nargs="+", default=(), metavar="TOKENS", help="lengths for all sizes (default with --widths: 2M)"
    )
    parser.add_argument("--seeds", metavar="N", help="runs at each point of the grid (default 1)")
    parser.add_argument("--yes", action="store_true", help="start even if the sweep takes more than an hour")
    add_queue_arguments(parser, out="runs/sweep, with --widths runs/sweep-widths")
    add_config(parser, TrainConfig, only=shared_settings.SWEEP_TRAINING, defaults={"recipe": "paper"})
    group = parser.add_argument_group("model settings", "override the presets, for all runs")
    add_config(group, ModelConfig, prefix="model.", only=shared_settings.SWEEP_MODEL)


def run(parsed: argparse.Namespace) -> None:
    """Run the sweep, and print what it found."""
    from antransformer.sweeps.report import lead

    out = parsed.out or Path("runs") / ("sweep-widths" if parsed.widths else "sweep")
    results = antransformer.sweep(
        out=out,
        architectures=parsed.architectures,
        sizes=parsed.sizes,
        widths=parsed.widths,
        batch_tokens=parsed.batch_tokens,
        lrs=parsed.lrs,
        lr_trials=number(parsed, "lr_trials", None),
        tokens=parsed.tokens,
        tokens_per_param=parsed.tokens_per_param,
        seeds=number(parsed, "seeds", 1),
        devices=parsed.devices,
        workers=number(parsed, "workers", None),
        max_hours=None if parsed.yes else HOURS_WITHOUT_YES,
        progress=True,
        **settings_of(parsed),
    )
    print(f"\n{lead(results)}\n")
    print(f"report: {out / 'report.html'}")
    print(f"laws: antransformer fit {quoted(out)}")
