"""Look at the norms inside a trained model: residual stream, blocks, factors, residual steps and weights.

Prints tables for any checkpoint, says what they mean, and draws them into diagnose.png in the run folder.

examples:
  antransformer diagnose --checkpoint runs/angpt-nano
  antransformer diagnose --checkpoint runs/angpt-nano --data data/mine --json norms.json
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from antransformer.cli.common import DEFAULT_DATA, check_target, new_table, open_data
from antransformer.cli.options import Parser
from antransformer.diagnostics.diagnose import (
    LEGEND,
    Diagnosis,
    FactorError,
    Spread,
    diagnose,
    mean_error,
    meaning,
    number,
    text_tokens,
)
from antransformer.diagnostics.figure import diagnosis_figure
from antransformer.errors import MissingExtraError
from antransformer.training.checkpointing.checkpoint import restore
from antransformer.training.config import Count, convert
from antransformer.training.device import choose_device
from antransformer.training.run_folder import open_checkpoint, saved_settings

USAGE = "antransformer diagnose --checkpoint RUN [options]"
TOKENS = 16_384
FIGURE_FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or one checkpoint")
    parser.add_argument(
        "--data", metavar="DIR", help="prepared data, of which the held-out text is read (default: the run's)"
    )
    parser.add_argument(
        "--tokens", metavar="TOKENS", help="how much text to look at (default 16,384, at least one sequence)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture (default diagnose.png in the run folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(parsed: argparse.Namespace) -> None:
    """Measure, print, draw."""
    found, tokenizer = open_checkpoint(parsed.checkpoint, notify=lambda text: print(text, file=sys.stderr))
    folder = found.path.parent.parent
    picture = parsed.out or folder / "diagnose.png"
    check_target("--out", picture, FIGURE_FORMATS)
    if parsed.json:
        check_target("--json", parsed.json)
    device = choose_device(parsed.device)
    dataset = open_data(parsed.data or saved_settings(folder).get("data", DEFAULT_DATA))
    count = max(TOKENS, found.model.context) if parsed.tokens is None else convert(parsed.tokens, Count, "--tokens")
    tokens = text_tokens(dataset, tokenizer, found.model, count)
    diagnosis = diagnose(restore(found, device), tokens)
    title = f"{folder.name} ({diagnosis.architecture}), step {found.step:,}"
    print(f"{title}: {diagnosis.tokens:,} tokens of held-out text from {dataset.path}\n")
    show(diagnosis)
    if parsed.json:
        content = {"checkpoint": str(found.path), "step": found.step, "data": str(dataset.path), **asdict(diagnosis)}
        parsed.json.write_text(
            json.dumps({**content, "meaning": meaning(diagnosis)}, indent=2) + "\n", encoding="utf-8"
        )
        print(f"figures: {parsed.json}")
    try:
        diagnosis_figure(diagnosis, title, picture)
        print(f"picture: {picture}")
    except MissingExtraError as error:
        print(f"no picture: {error}")


def show(diagnosis: Diagnosis) -> None:
    """Print tables and words."""
    console = Console(highlight=False)
    console.print("Norm of the residual stream after the last block, mean and deviation over tokens", style="bold")
    console.print(residual_table(diagnosis))
    console.print("Norm of the output over norm of the input, on text", style="bold")
    console.print(ratio_table(diagnosis))
    if diagnosis.factors:
        console.print("Factors, and those that the measured norms need, means over layers", style="bold")
        console.print(factor_table(diagnosis))
        console.print(f"{LEGEND}\n")
    else:
        console.print(f"{diagnosis.architecture} has no constant factors to compare with measured norms.\n")
    for sentence in meaning(diagnosis):
        console.print(sentence)
    console.print()


def residual_table(diagnosis: Diagnosis) -> Table:
    """Text beside repeated tokens (arXiv:2505.22014, table O.1)."""
    text, repeated = (diagnosis.residual_norm[kind][-1] for kind in ("text", "repeated"))
    table = new_table("input", "norm")
    table.add_row("text", plus_minus(text))
    table.add_row(
        f"{len(diagnosis.repeated_ids)} frequent tokens, each {diagnosis.repeated_length} times", plus_minus(repeated)
    )
    table.add_row("ratio", number(text.mean / repeated.mean))
    return table


def ratio_table(diagnosis: Diagnosis) -> Table:
    """Blocks and sublayers (arXiv:2505.22014, table N.1)."""
    layers = len(diagnosis.norm_ratio["block"])
    marks = {layers // 2: "middle", layers - 1: "last", 0: "first"}
    table = new_table("", "", *diagnosis.norm_ratio)
    for layer, spreads in enumerate(zip(*diagnosis.norm_ratio.values(), strict=True)):
        style = "bold" if layer in marks else None
        table.add_row(marks.get(layer), str(layer + 1), *map(plus_minus, spreads), style=style)
    return table


def factor_table(diagnosis: Diagnosis) -> Table:
    """Errors of the factors (arXiv:2505.22014, table N.2)."""
    columns = ("\nerror", "\nspread")
    table = new_table("", "factor", "random:\nneeded", *columns, "text:\nneeded", *columns, "worst\nlayer")
    for name, kinds in diagnosis.factors.items():
        text = kinds["text"]
        worst = max(range(len(text)), key=lambda layer: abs(text[layer].error))
        table.add_row(
            name,
            f"{mean(layer.factor for layer in text):.3f}",
            *factor_cells(kinds["random"]),
            *factor_cells(text),
            f"{text[worst].error:+.0%} ({worst + 1})",
        )
    return table


def factor_cells(layers: list[FactorError]) -> tuple[str, str, str]:
    """Needed factor, size of the error, and spread, as means over layers."""
    needed, spread = mean(layer.needed for layer in layers), mean(layer.spread for layer in layers)
    return f"{needed:.3f}", f"{number(100 * mean_error(layers))}%", f"{spread:.1%}"


def plus_minus(spread: Spread) -> str:
    """Mean and standard deviation."""
    return f"{number(spread.mean)} ± {number(spread.std, like=spread.mean)}"
