"""Score a trained model with lm_eval, or by its perplexity on text.

--text needs no lm_eval. It reports word perplexity, byte perplexity and bits per byte as lm_eval defines them.

Without --task-data, the data of a task is downloaded from the Hugging Face hub, and any lm_eval task that scores given
text can be run. With --task-data DIR, these tasks read files as their authors published them: lambada_openai,
hellaswag, arc_easy, arc_challenge, piqa, winogrande, blimp (or a part of it, such as blimp_wh_island) and wikitext.

files in DIR, up to two folders deep, case ignored, - or _ between words:
  lambada_openai  lambada*test.jsonl
  hellaswag       hellaswag*val*.jsonl
  arc_easy        arc_easy*test*.jsonl; val or dev in place of test too
  arc_challenge   arc_challenge*test*.jsonl; val or dev too
  piqa            piqa*val*.jsonl or piqa*/dev.jsonl; labels inside, or in
                  *-labels.lst next to it
  winogrande      winogrande*val*.jsonl or winogrande*/dev.jsonl
  blimp           blimp*/NAME.jsonl
  wikitext        wiki.test.raw or wiki.test.tokens

examples:
  antransformer evaluate --checkpoint runs/angpt-125m --tasks lambada_openai,hellaswag,arc_easy,piqa,winogrande,wikitext
  antransformer evaluate --checkpoint runs/angpt-125m --tasks hellaswag,blimp --task-data sets/ --limit 500
  antransformer evaluate --checkpoint runs/angpt-125m --text book.txt
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import antransformer
from antransformer.cli.options import Parser, add_checkpoint_argument, add_device_argument, number
from antransformer.cli.tables import TableConsole, new_table
from antransformer.wording import counted

if TYPE_CHECKING:
    from antransformer.api.checkpoints import Evaluation

USAGE = "antransformer evaluate --checkpoint RUN [--tasks NAMES] [--text FILE ...]\n       [options]"
BATCH_SIZE = 16


def add_arguments(parser: Parser) -> None:
    """Add the options of ``evaluate``: checkpoint, tasks or texts, batch size and output file."""
    add_checkpoint_argument(parser)
    parser.add_argument("--tasks", default="", metavar="NAMES", help="lm_eval tasks, separated by commas")
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="folder with the files of the tasks")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="files of text with <|endoftext|> between documents, of JSON lines, or .parquet",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of JSON lines or column of .parquet that holds the text (default text)",
    )
    parser.add_argument("--batch-size", metavar="N", help=f"texts per forward pass (default {BATCH_SIZE})")
    parser.add_argument("--limit", metavar="N", help="only the first N items of a task, or documents of a file")
    add_device_argument(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file of all scores, overwritten (default evaluation.json in the run folder). An interrupted "
        "evaluation leaves the scores of its finished tasks and files in evaluation.unfinished.json",
    )


def run(parsed: argparse.Namespace) -> None:
    """Evaluate, and print the scores."""
    evaluation = antransformer.evaluate(
        parsed.checkpoint,
        tasks=[name.strip() for name in parsed.tasks.split(",") if name.strip()],
        task_data=parsed.task_data,
        texts=parsed.text,
        text_field=parsed.text_field,
        batch_size=number(parsed, "batch_size", BATCH_SIZE),
        limit=number(parsed, "limit", None),
        device=parsed.device,
        out=parsed.out,
        progress=True,
    )
    checkpoint = evaluation.checkpoint
    run_name = checkpoint.path.resolve().parent.parent.name
    print(f"{run_name} ({checkpoint.model.architecture}), step {checkpoint.step:,}\n")
    print_scores(evaluation)
    print(f"scores: {evaluation.path}")


def print_scores(evaluation: "Evaluation") -> None:
    """Print the table of scores, the tasks without scores, and how many texts were truncated."""
    from antransformer.interop.evaluate import format_score

    errors = any(score.stderr is not None for score in evaluation.scores)
    table = new_table("task", "metric", "value", *["error"] * errors, "items")
    for score in evaluation.scores:
        error = "" if score.stderr is None else f"± {format_score(score.stderr)}"
        table.add_row(score.task, score.metric, format_score(score.value), *[error] * errors, f"{score.items:,}")
    TableConsole().print(table)
    context = evaluation.checkpoint.model.context
    for result in evaluation.results:
        if result.problem:
            print(f"{result.name} cannot be scored: {result.problem}")
        elif result.cut:
            print(
                f"{result.name}: of {counted(result.texts, 'sequence')}, {result.cut:,} exceeded the context of "
                f"{context:,} tokens, and the beginning was cut off"
            )
