"""Take anGPT apart: what each factor, bound and setting is worth.

Trains the default and one variant after the other with the same data and seeds, and says for each how much its loss
differs and whether that is more than chance. Learning rates are the default's unless --lr-trials is raised. The same
command goes on where a killed one was.

examples:
  antransformer ablate --quick
  antransformer ablate --only 'constant-*' residual-none no-lerp --tokens 2M --seeds 5
  antransformer ablate --list
"""

import argparse
from pathlib import Path

from antransformer.cli.compare import add_experiment_arguments, effort, execute
from antransformer.cli.options import Parser, settings_of
from antransformer.comparison.ablate import plan, suite
from antransformer.comparison.compare import QUICK, budgets_of
from antransformer.models.config import preset_sizes
from antransformer.settings import Count, convert
from antransformer.training.config import normalize_settings

USAGE = "antransformer ablate [options]"


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="variants, or patterns such as 'all-*'")
    parser.add_argument("--list", action="store_true", help="print the names of all variants, and end")
    parser.add_argument("--tokens", metavar="TOKENS", help="length of every run (default 1M)")
    parser.add_argument("--quick", action="store_true", help="the size of compare --quick, and 500K tokens")
    add_experiment_arguments(parser, lr_trials=1)


def run(parsed: argparse.Namespace) -> None:
    """Plan, run, report."""
    if parsed.list:
        print("\n".join(suite(preset_sizes("nano")["width"])))
        return
    given = normalize_settings(settings_of(parsed), "command line")
    tokens = convert(parsed.tokens or ("500K" if parsed.quick else "1M"), Count, "--tokens")
    planned = plan(
        {**QUICK, **given} if parsed.quick else given,
        parsed.only,
        budgets_of(tokens, [tokens]),
        **effort(parsed, lr_trials=1),
    )
    execute(planned, parsed, parsed.out or Path("runs") / ("ablate-quick" if parsed.quick else "ablate"))
