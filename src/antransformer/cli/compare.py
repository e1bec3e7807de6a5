"""Compare architectures tuned by the same search, with several seeds and confidence intervals.

At every budget, each architecture first searches its learning rates (--lr-trials). Then it searches the separate rates
of embedding, head and vectors, and its own hyperparameters (--tuning-trials). A grid has the same number of values and
the same factor between them for all architectures. At the shortest budget, grids are centered on the defaults, and if
several settings are searched, all of them are searched twice. At a longer budget, grids are centered on the best values
of the next shorter one.

Then every budget is run with every seed. The first architecture is the baseline. Runs start at once. If interrupted,
run the same command again to continue; more --seeds or a longer budget in --budgets add the missing runs.

examples:
  antransformer compare --quick
  antransformer compare --data data/mine --preset nano --tokens 20M --architectures gpt+ ngpt angpt --seeds 3
  antransformer compare --variants variants.yaml --budgets 10M 20M --lr-trials 1 --tuning-trials 1
  antransformer compare --budgets 5M 10M 20M 40M --architectures gpt+ angpt --devices cuda:0 cuda:1
"""

import argparse
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser, add_experiment_arguments, experiment_options, number, settings_of
from antransformer.models import registry

USAGE = "antransformer compare [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``compare``: architectures, budgets, tuning effort and shared settings."""
    parser.add_argument(
        "--architectures",
        nargs="+",
        metavar="NAME",
        help=f"two or more of {', '.join(registry.names())}; the first is the baseline. A suffix selects a recipe or "
        "an optimizer for one of them, as in angpt-best, gpt+-paper or angpt-normuon (default gpt+ angpt)",
    )
    parser.add_argument(
        "--variants",
        metavar="FILE",
        help="YAML file with settings for each variant, instead of --architectures. Settings that are given are not "
        "searched, and the key budgets holds those for single budgets",
    )
    parser.add_argument(
        "--tokens", metavar="TOKENS", help="largest budget; a quarter and a half of it are run too (default 8M)"
    )
    parser.add_argument(
        "--budgets", nargs="+", default=(), metavar="TOKENS", help="budgets to run, instead of --tokens"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="preset pico, recipe paper, batches of 1,024 tokens, budgets of 100K, 200K and 400K, validation on 65,536 "
        "tokens, --out runs/compare-quick: about an hour on two cores",
    )
    parser.add_argument(
        "--tuning-trials",
        metavar="N",
        help="number of values to try of each architecture's own hyperparameters, spaced by factors of 3: s_scale of "
        "angpt and ngpt, init_std of gpt+, gpt and ln-scaling, dyt_alpha_init of dyt, weight_decay of all that have it "
        "(default 3); 1 keeps the defaults",
    )
    parser.add_argument(
        "--separate-rates",
        action=argparse.BooleanOptionalAction,
        help="also search embed_lr, head_lr and, with AdamW, vector_lr, the learning rates of embedding, head and "
        "vectors, before these hyperparameters and with the same number of values. They take the place of s_scale, "
        "which only divides vector_lr (default: on, except with --tuning-trials 1)",
    )
    add_experiment_arguments(parser, lr_trials=3, out="runs/compare-PRESET")


def run(parsed: argparse.Namespace) -> None:
    """Run the comparison, and print its summary."""
    from antransformer.comparison.summary import summary

    preset = settings_of(parsed).get("preset", "nano")
    out = parsed.out or Path("runs") / f"compare-{'quick' if parsed.quick else preset}"
    results = antransformer.compare(
        parsed.architectures,
        out=out,
        variants=parsed.variants,
        tokens=parsed.tokens,
        budgets=parsed.budgets,
        quick=parsed.quick,
        tuning_trials=number(parsed, "tuning_trials", None),
        separate_rates=parsed.separate_rates,
        **experiment_options(parsed),
    )
    print(f"\n{summary(results)}\n")
    print(f"report: {out / 'report.html'}")
