"""Measure norms inside a trained model: residual stream, blocks, factors and weights.

Prints tables and a summary, and draws a figure: diagnose.png in the run folder.

examples:
  antransformer diagnose --checkpoint runs/angpt-nano
  antransformer diagnose --checkpoint runs/angpt-nano --data data/mine --json norms.json
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean

from rich.table import Table

from antransformer.cli.options import Parser, add_checkpoint_argument, add_device_argument
from antransformer.cli.tables import TableConsole, new_table
from antransformer.diagnostics.diagnosis import LEGEND, Diagnosis, FactorError, Spread, mean_abs_error
from antransformer.diagnostics.figure import diagnosis_figure
from antransformer.diagnostics.summary import format_number, summarize
from antransformer.errors import CheckpointError, MissingExtraError
from antransformer.files import FIGURE_FORMATS, check_file_target, check_json_target, write_result
from antransformer.settings import Count, convert

USAGE = "antransformer diagnose --checkpoint RUN [options]"
TOKENS = 16_384


def add_arguments(parser: Parser) -> None:
    """Add the options of ``antransformer diagnose``."""
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--data", metavar="DIR", help="prepared data with the validation text (default: the run's data)"
    )
    parser.add_argument(
        "--tokens",
        metavar="TOKENS",
        help=f"number of tokens of text to measure (default {TOKENS:,}, at least one sequence)",
    )
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="figure file (default RUN/diagnose.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")


def run(parsed: argparse.Namespace) -> None:
    """Diagnose a checkpoint, print tables and write the figure."""
    # torch is imported here, so that --help and mistyped options are fast.
    from antransformer.data.mixture import open_mixture
    from antransformer.data.stdlib import NAME as STDLIB
    from antransformer.diagnostics.diagnose import diagnose, text_tokens
    from antransformer.progress import open_dataset
    from antransformer.training.checkpointing.checkpoint import restore
    from antransformer.training.device import choose_device
    from antransformer.training.run_folder import CONFIG_FILE, open_checkpoint, run_folder_of, saved_settings

    checkpoint, tokenizer = open_checkpoint(parsed.checkpoint, notify=lambda text: print(text, file=sys.stderr))
    folder = run_folder_of(checkpoint)
    figure_path = parsed.out or folder / "diagnose.png"
    check_file_target("--out", figure_path, FIGURE_FORMATS)
    if parsed.json:
        check_json_target("--json", parsed.json, lambda content: "residual_norm" in content)
    device = choose_device(parsed.device)
    if not parsed.data and not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}, which names the data: give --data")
    data = parsed.data or saved_settings(folder).get("data", STDLIB)
    dataset = open_mixture(data, None, partial(open_dataset, progress=True))
    context = checkpoint.model.context
    count = max(TOKENS, context) if parsed.tokens is None else convert(parsed.tokens, Count, "--tokens")
    tokens = text_tokens(dataset, tokenizer, checkpoint.model, count)
    diagnosis = diagnose(restore(checkpoint, device), tokens)
    title = f"{folder.name} ({diagnosis.architecture}), step {checkpoint.step:,}"
    # Files first: whoever reads the tables may close the pipe.
    written = []
    if parsed.json:
        source = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "data": dataset.name}
        content = {**source, **asdict(diagnosis), "summary": summarize(diagnosis)}
        write_result(parsed.json, json.dumps(content, indent=2) + "\n")
        written.append(f"measurements: {parsed.json}")
    try:
        diagnosis_figure(diagnosis, title, figure_path)
        written.append(f"figure: {figure_path}")
    except MissingExtraError as error:
        written.append(f"no figure: {error}")
    print(f"{title}: {diagnosis.tokens:,} tokens of validation text from {dataset.name}\n")
    print_tables(diagnosis)
    print("\n".join(written))


def print_tables(diagnosis: Diagnosis) -> None:
    """Print tables of a diagnosis, then its summary."""
    console = TableConsole()
    console.print("Norm of the residual stream after the last block, mean ± std over tokens", style="bold")
    console.print(residual_table(diagnosis))
    console.print("Output norm over input norm, on text", style="bold")
    console.print(ratio_table(diagnosis))
    if diagnosis.factors:
        console.print("Factors in use and factors needed by the measured norms, means over layers", style="bold")
        console.print(factor_table(diagnosis))
        console.print(f"{LEGEND}\n")
    else:
        console.print(f"{diagnosis.architecture} has no constant factors to compare with measured norms.\n")
    for sentence in summarize(diagnosis):
        console.print(sentence)
    console.print()


def residual_table(diagnosis: Diagnosis) -> Table:
    """Norms on text and on repeated tokens (arXiv:2505.22014, table O.1)."""
    text, repeated = (diagnosis.residual_norm[kind][-1] for kind in ("text", "repeated"))
    table = new_table("input", "norm")
    table.add_row("text", plus_minus(text))
    table.add_row(
        f"{len(diagnosis.repeated_ids)} frequent tokens, each {diagnosis.repeated_length} times", plus_minus(repeated)
    )
    table.add_row("ratio", format_number(text.mean / repeated.mean))
    return table


def ratio_table(diagnosis: Diagnosis) -> Table:
    """Norm ratios of blocks and sublayers by layer (arXiv:2505.22014, table N.1)."""
    layers = len(diagnosis.norm_ratio["block"])
    marks = {layers // 2: "middle", layers - 1: "last", 0: "first"}
    table = new_table("", "", *diagnosis.norm_ratio)
    for layer, spreads in enumerate(zip(*diagnosis.norm_ratio.values(), strict=True)):
        style = "bold" if layer in marks else None
        table.add_row(marks.get(layer), str(layer + 1), *map(plus_minus, spreads), style=style)
    return table


def factor_table(diagnosis: Diagnosis) -> Table:
    """Errors of the constant factors by map (arXiv:2505.22014, table N.2)."""
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
    """Needed factor, absolute error in percent, and spread, as means over layers."""
    needed, spread = mean(layer.needed for layer in layers), mean(layer.spread for layer in layers)
    return f"{needed:.3f}", f"{format_number(100 * mean_abs_error(layers))}%", f"{spread:.1%}"


def plus_minus(spread: Spread) -> str:
    """Format mean ± standard deviation with equal decimals."""
    return f"{format_number(spread.mean)} ± {format_number(spread.std, precision_of=spread.mean)}"
