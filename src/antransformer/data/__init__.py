"""Text to tokens to shards to batches.

``prepare`` turns files into a folder of token shards, ``Dataset.open`` reads one back, and ``Windows`` and
``sequential`` make batches of it for training and evaluation, ``Ahead`` makes them before they are needed.
"""

from antransformer.data.batches import Prefetcher, ShuffledWindows, eval_batches
from antransformer.data.dataset import Dataset, Shard, Split
from antransformer.data.prepare import prepare
from antransformer.data.stdlib import ensure_default, stdlib_files
from antransformer.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Dataset",
    "Prefetcher",
    "Shard",
    "ShuffledWindows",
    "Split",
    "Tokenizer",
    "byte_tokenizer",
    "ensure_default",
    "eval_batches",
    "load_tokenizer",
    "prepare",
    "stdlib_files",
    "train_bpe",
]
