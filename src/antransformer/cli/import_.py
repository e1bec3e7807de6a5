"""Make a run folder of a Hugging Face folder that "antransformer export" wrote.

The run stands at step 0: text can be written with it, and training started from its weights.

examples:
  antransformer import exported/angpt-nano --out runs/imported
  antransformer train --init runs/imported --data data/mine --tokens 1M --lr 1e-3
"""

import argparse
from pathlib import Path

from antransformer.cli.options import Parser
from antransformer.interop.import_hf import import_folder

USAGE = "antransformer import DIR --out RUN"


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the exported folder")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to make")


def run(parsed: argparse.Namespace) -> None:
    """Write the run folder."""
    print(f"weights and tokenizer of {parsed.folder}: {import_folder(parsed.folder, parsed.out)}")
    print(f"next: antransformer generate --checkpoint {parsed.out}, or antransformer train --init {parsed.out}")
