"""Check all tokens of a data folder against its checksums.

Training checks only sizes and a sample of the data when it starts. Run this after data was copied or a disk failed.

examples:
  antransformer verify data/corpus
  antransformer verify data/corpus --jobs 16
"""

import argparse
import os
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser
from antransformer.wording import counted

USAGE = "antransformer verify DATA [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``verify``: the data folder and the number of jobs."""
    parser.add_argument("data", type=Path, metavar="DATA", help="prepared data folder")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of files to read at a time (default: number of CPU cores)",
    )


def run(parsed: argparse.Namespace) -> None:
    """Check the data, and print its size."""
    dataset = antransformer.verify(parsed.data, jobs=parsed.jobs, progress=True)
    tokens = sum(split.tokens for split in dataset.splits.values())
    print(f"{parsed.data}: {counted(len(dataset.shards), 'shard')}, {tokens:,} tokens: as prepared")
