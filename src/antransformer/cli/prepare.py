"""Turn text into a data folder to train on.

INPUT is a file, a folder or a quoted pattern: plain text (.txt .md .py and the like), JSON lines (.jsonl .ndjson .json)
with a "text" field, or .parquet with a "text" column. Text and JSON lines may be compressed (.gz .zst .xz .bz2). In
plain text, <|endoftext|> ends a document.

hf://DATASET?name=CONFIG&split=train&field=text streams a dataset from the Hugging Face hub.

examples:
  antransformer prepare book.txt --out data/book --val-fraction 0.1
  antransformer prepare 'corpus/*.jsonl.zst' --out data/corpus --bpe-vocab-size 32768
  antransformer prepare 'fineweb/*.bin' --tokenized --tokenizer gpt2/tokenizer.json --out data/fineweb
  antransformer prepare corpus --out data/corpus --tokenizer tokenizer.json --part 1/8
  antransformer prepare --out data/corpus --join
  antransformer prepare 'hf://roneneldan/TinyStories?split=train' --out data/stories
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import antransformer
from antransformer.cli.options import Parser
from antransformer.errors import ConfigError
from antransformer.files import quoted
from antransformer.wording import counted

if TYPE_CHECKING:
    from antransformer.data import Dataset

USAGE = "antransformer prepare INPUT... --out DIR [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``prepare``: inputs, folder, tokenizer and held-out text."""
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="text files, folders or patterns")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="data folder to create")
    tokenizers = parser.add_mutually_exclusive_group()
    tokenizers.add_argument(
        "--tokenizer",
        default="byte",
        metavar="NAME",
        help="byte, a tokenizer.json or a folder with one (default byte)",
    )
    tokenizers.add_argument(
        "--bpe-vocab-size", type=int, metavar="N", help="train a byte-level BPE of this vocabulary size on the input"
    )
    parser.add_argument(
        "--end-of-text",
        metavar="TOKEN",
        help="special token that ends a document (default: eos_token of the tokenizer)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="fraction of documents to hold out (default 0.01; more of a small text, or the end of each document)",
    )
    parser.add_argument(
        "--val-inputs",
        nargs="+",
        default=(),
        metavar="INPUT",
        help="validation text (default: a fraction of INPUT)",
    )
    parser.add_argument(
        "--tokenized",
        action="store_true",
        help="read token ids instead of text: .bin of llm.c, .bin with .idx of Megatron-LM, or .ds of datatrove. The "
        "files are linked, not copied",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of JSON lines or column of parquet with the text, such as record.body (default text)",
    )
    parser.add_argument("--part", metavar="I/N", help="write only part I of N, for preparation on several machines")
    parser.add_argument("--join", action="store_true", help="combine all parts in --out into one data folder")


def run(parsed: argparse.Namespace) -> None:
    """Prepare the data, and print its size."""
    from antransformer.api.training import join_parts, prepare_part

    if parsed.join:
        defaults = {"inputs": [], "tokenizer": "byte", "text_field": "text", "tokenized": False}
        others = ("part", "bpe_vocab_size", "end_of_text", "val_fraction", "val_inputs")
        given = [name for name in (*defaults, *others) if getattr(parsed, name) not in (defaults.get(name), ())]
        if given:
            names = ", ".join("INPUT" if name == "inputs" else f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"--join combines finished parts and takes no other option: omit {names}")
        _print_size(parsed.out, join_parts(parsed.out, progress=True))
        return
    if not parsed.inputs:
        place = " before --val-inputs, which takes all words after it" if parsed.val_inputs else ""
        raise ConfigError(f"INPUT is missing: give text files, folders or patterns{place}")
    options = {
        "tokenizer": parsed.tokenizer,
        "end_of_text": parsed.end_of_text,
        "val_fraction": parsed.val_fraction,
        "val_inputs": parsed.val_inputs,
        "text_field": parsed.text_field,
        "progress": True,
    }
    if parsed.part:
        if parsed.tokenized or parsed.bpe_vocab_size is not None:
            raise ConfigError("--part needs text and a finished --tokenizer: omit --tokenized and --bpe-vocab-size")
        folder = prepare_part(parsed.inputs, parsed.out, parsed.part, **options)
        done = "was finished before" if folder is None else f"is in {folder}"
        print(f"part {parsed.part} {done}")
        print(f"after all parts: antransformer prepare --out {quoted(parsed.out)} --join")
        return
    dataset = antransformer.prepare(
        parsed.inputs, parsed.out, tokenized=parsed.tokenized, bpe_vocab_size=parsed.bpe_vocab_size, **options
    )
    _print_size(parsed.out, dataset)


def _print_size(out: Path, dataset: "Dataset") -> None:
    print(f"{out}: {dataset.tokenizer_name} tokenizer, vocabulary size {dataset.vocab_size:,}")
    for split in dataset.splits.values():
        print(
            f"  {split.name:5} {counted(split.documents, 'document')}, {split.tokens:,} tokens, {split.bytes:,} bytes, "
            f"{counted(len(split.shards), 'shard')}"
        )
    print(f"next: antransformer train --data {quoted(out)}")
