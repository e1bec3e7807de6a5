"""Make a Hugging Face folder of a checkpoint.

transformers loads it after "import antransformer", or without this package with trust_remote_code=True: the code is in
the folder. "antransformer import" makes a run of it again.

examples:
  antransformer export --checkpoint runs/angpt-nano --out exported/angpt-nano
  antransformer export --checkpoint runs/angpt-1b --out exported/angpt-1b --dtype bfloat16
"""

import argparse
import sys
from pathlib import Path

from antransformer.cli.options import Parser
from antransformer.comparison.summary import summary
from antransformer.interop.export import DTYPES, SHARD_SIZE, export
from antransformer.reporting import html as page
from antransformer.results import comparison as results
from antransformer.training.run_folder import open_checkpoint, run_folder_of

USAGE = "antransformer export --checkpoint RUN --out DIR [options]"
PICTURES = ("loss-tokens.png", "speedup-tokens.png")  # of a report, for the card of a run that belongs to it


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or one checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    parser.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help=f"largest file of weights (default {SHARD_SIZE})"
    )


def run(parsed: argparse.Namespace) -> None:
    """Write the folder."""
    found, tokenizer = open_checkpoint(parsed.checkpoint, notify=lambda text: print(text, file=sys.stderr))
    experiment = run_folder_of(found).parent.parent
    reported = all((experiment / name).is_file() for name in (page.FILE, results.FILE))
    words = summary(results.Results.load(experiment)) if reported else None
    pictures = [experiment / name for name in PICTURES if (experiment / name).is_file()] if reported else []
    export(found, tokenizer, parsed.out, parsed.dtype, parsed.max_shard_size, words, pictures)
    print(f"{parsed.out}: {found.model.architecture} of step {found.step:,}, {parsed.dtype}")
    print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{parsed.out}"), after import antransformer')
