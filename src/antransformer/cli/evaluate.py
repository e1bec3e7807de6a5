"""Score a trained model with lm_eval, or its perplexity on a text.

Without --task-data a task's data comes from the Hugging Face hub, and any task of lm_eval that scores given text can be
run. With it, the data lies in DIR, in the form in which each set is published: lambada_openai, hellaswag, arc_easy,
arc_challenge, piqa, winogrande, blimp (or one of its parts, such as blimp_wh_island), wikitext.

files looked for in DIR and two folders deep, in any case:
  lambada_openai  lambada*test.jsonl
  hellaswag       hellaswag*val*.jsonl
  arc_easy        arc_easy*test*.jsonl, or val or dev (ARC-Easy/ARC-Easy-Test.jsonl); so arc_challenge
  piqa            piqa*val*.jsonl or piqa*/dev.jsonl; with the labels in it, or beside it in *-labels.lst
  winogrande      winogrande*val*.jsonl or winogrande*/dev.jsonl
  blimp           blimp*/NAME.jsonl
  wikitext        wiki.test.raw or wiki.test.tokens

examples:
  antransformer evaluate --checkpoint runs/angpt-125m --tasks lambada_openai,hellaswag,arc_easy,piqa,winogrande,wikitext
  antransformer evaluate --checkpoint runs/angpt-125m --tasks hellaswag,blimp --task-data sets/ --limit 500
  antransformer evaluate --checkpoint runs/angpt-125m --text book.txt
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from antransformer.cli.common import check_target, new_table
from antransformer.cli.options import Parser, number
from antransformer.cli.progress import EvaluationProgress
from antransformer.interop.evaluate import BATCH_SIZE, Result, evaluate
from antransformer.interop.model_card import EVALUATION_FILE
from antransformer.training.device import choose_device
from antransformer.training.run_folder import open_checkpoint, run_folder_of

USAGE = "antransformer evaluate --checkpoint RUN (--tasks NAMES | --text FILE ...) [options]"


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or one checkpoint")
    parser.add_argument("--tasks", default="", metavar="NAMES", help="tasks by lm_eval's names, with commas between")
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="folder with the files of the tasks")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text, <|endoftext|> between documents"
    )
    parser.add_argument("--batch-size", metavar="N", help=f"texts at a time (default {BATCH_SIZE})")
    parser.add_argument("--limit", metavar="N", help="only the first N items of a task, or documents of a file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"all figures as JSON (default {EVALUATION_FILE} in the run folder)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Score, print, write."""
    found, tokenizer = open_checkpoint(parsed.checkpoint, notify=lambda text: print(text, file=sys.stderr))
    out = parsed.out or run_folder_of(found) / EVALUATION_FILE
    check_target("--out", out)
    batch_size, limit = number(parsed, "batch_size", BATCH_SIZE), number(parsed, "limit", None)
    tasks = [name.strip() for name in parsed.tasks.split(",") if name.strip()]
    with EvaluationProgress() as progress:
        results = evaluate(
            found,
            tokenizer,
            tasks,
            parsed.task_data,
            parsed.text,
            batch_size,
            limit,
            choose_device(parsed.device),
            progress,
        )
    print(f"{run_folder_of(found).name} ({found.model.architecture}), step {found.step:,}\n")
    show(results, found.model.context)
    settings = {"checkpoint": str(found.path), "step": found.step, "batch_size": batch_size, "limit": limit}
    content = {**settings, "results": [asdict(result) for result in results]}
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"figures: {out}")


def show(results: list[Result], context: int) -> None:
    """Print the table, and what is to be known of it."""
    table = new_table("task", "metric", "value", "error", "items")
    for score in (score for result in results for score in result.summary()):
        error = "" if score.stderr is None else f"± {digits(score.stderr)}"
        table.add_row(score.task, score.metric, digits(score.value), error, f"{score.items:,}")
    Console(highlight=False).print(table)
    for result in results:
        if result.problem:
            print(f"{result.name} can not be scored: {result.problem}")
        elif result.cut:
            print(
                f"{result.name}: {result.cut:,} of {result.texts:,} texts were longer than the context of {context:,} "
                "tokens, and lost their beginning"
            )


def digits(value: float | None) -> str:
    """Four decimals of a small number, four figures of a large one."""
    if value is None:
        return "infinite"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"
