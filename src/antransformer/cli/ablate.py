"""Measure what each part of anGPT contributes.

Trains the default and variants that change one factor, bound or setting each, with the same data and seeds. The report
gives each variant's difference in loss and whether it is significant. All variants use the default's learning rate
unless --lr-trials is raised. If interrupted, run the same command again to continue.

examples:
  antransformer ablate --quick
  antransformer ablate --only 'constant-*' residual-none no-lerp --tokens 2M --seeds 5
  antransformer ablate --list
"""

import argparse
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser, add_experiment_arguments, experiment_options

USAGE = "antransformer ablate [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``ablate``: variants, length of the runs, tuning effort and shared settings."""
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names of variants or patterns such as 'all-*' (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="print the names and descriptions of all variants and exit")
    parser.add_argument("--tokens", metavar="TOKENS", help="length of each run (default 1M; with --quick 500K)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="preset, recipe, batch and validation of compare --quick; 500K tokens",
    )
    add_experiment_arguments(parser, lr_trials=1, out="runs/ablate, with --quick runs/ablate-quick")


def run(parsed: argparse.Namespace) -> None:
    """Run the ablation and print its summary, or list the variants."""
    from antransformer.comparison.ablate import DESCRIPTIONS
    from antransformer.comparison.summary import summary

    if parsed.list:
        for name, description in DESCRIPTIONS.items():
            print(f"{name:20} {description}")
        return
    out = parsed.out or Path("runs") / ("ablate-quick" if parsed.quick else "ablate")
    results = antransformer.ablate(
        parsed.only, out=out, tokens=parsed.tokens, quick=parsed.quick, **experiment_options(parsed)
    )
    print(f"\n{summary(results)}\n")
    print(f"report: {out / 'report.html'}")
