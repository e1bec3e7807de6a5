"""Import a Hugging Face folder that "antransformer export" wrote.

Creates a run folder with the weights as the checkpoint of step 0. Use it to generate text, or to start a new run.

examples:
  antransformer import exported/angpt-nano --out runs/imported
  antransformer train --init runs/imported --data data/mine --tokens 1M --lr 1e-3
"""

import argparse
from pathlib import Path

from antransformer.cli.options import Parser
from antransformer.files import quoted

USAGE = "antransformer import DIR --out RUN"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``import``: exported folder and run folder."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="exported folder")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to create")


def run(parsed: argparse.Namespace) -> None:
    """Import, and print the checkpoint."""
    from antransformer.interop.import_hf import import_folder

    print(f"weights and tokenizer of {parsed.folder}: {import_folder(parsed.folder, parsed.out)}")
    run = quoted(parsed.out)
    print(f"next: antransformer generate --checkpoint {run}, or antransformer train --init {run}")
