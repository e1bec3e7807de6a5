"""Turn text into a data folder to train on.

INPUT is a file, a folder or a quoted pattern: plain text (.txt .md .py and the like), .jsonl, .jsonl.gz or .jsonl.zst
with a "text" field, .parquet with a "text" column. In plain text <|endoftext|> ends a document.

examples:
  antransformer prepare book.txt --out data/book --val-fraction 0.1
  antransformer prepare 'corpus/*.jsonl.zst' --out data/corpus --bpe-vocab-size 32768
  antransformer prepare corpus --out data/corpus --tokenizer path/to/tokenizer.json
"""

import argparse
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser
from antransformer.files import quoted

USAGE = "antransformer prepare INPUT... --out DIR [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``prepare``: inputs, folder, tokenizer and held-out text."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text files, folders or patterns")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="data folder to create")
    tokenizers = parser.add_mutually_exclusive_group()
    tokenizers.add_argument(
        "--tokenizer", default="byte", metavar="NAME", help="byte, or the path of a tokenizer.json (default byte)"
    )
    tokenizers.add_argument(
        "--bpe-vocab-size", type=int, metavar="N", help="train a byte-level BPE of this vocabulary size on the input"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, metavar="X", help="fraction of documents to hold out (default 0.01)"
    )
    parser.add_argument("--val-inputs", nargs="+", default=(), metavar="INPUT", help="text to hold out instead")


def run(parsed: argparse.Namespace) -> None:
    """Prepare the data, and print its size."""
    dataset = antransformer.prepare(
        parsed.inputs,
        parsed.out,
        tokenizer=parsed.tokenizer,
        bpe_vocab_size=parsed.bpe_vocab_size,
        val_fraction=parsed.val_fraction,
        val_inputs=parsed.val_inputs,
        progress=True,
    )
    print(f"{parsed.out}: {dataset.tokenizer_name} tokenizer, vocabulary size {dataset.vocab_size:,}")
    for split in dataset.splits.values():
        print(
            f"  {split.name:5} {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes, "
            f"{len(split.shards)} shards"
        )
    print(f"next: antransformer train --data {quoted(parsed.out)}")
