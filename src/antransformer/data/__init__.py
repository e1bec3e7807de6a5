"""Text to tokens to shards to batches.

``prepare`` writes a folder of token shards and ``Dataset.open`` reads it. ``ShuffledWindows`` makes training batches,
``Prefetcher`` reads them ahead of time, and ``eval_batches`` makes evaluation batches.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antransformer.data.batches import Prefetcher, ShuffledWindows, eval_batches
    from antransformer.data.checks import Shard
    from antransformer.data.dataset import Dataset, Split
    from antransformer.data.parts import join_parts, prepare_part
    from antransformer.data.preparation import prepare
    from antransformer.data.stdlib import ensure_default, stdlib_files
    from antransformer.data.tokenized import prepare_tokenized
    from antransformer.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
    from antransformer.data.verification import verify

# Names are imported on first use (PEP 562), so that the help of the command line does not wait for torch.
_MODULES = {
    "Dataset": "dataset",
    "Prefetcher": "batches",
    "Shard": "checks",
    "ShuffledWindows": "batches",
    "Split": "dataset",
    "Tokenizer": "tokenizers",
    "byte_tokenizer": "tokenizers",
    "ensure_default": "stdlib",
    "eval_batches": "batches",
    "join_parts": "parts",
    "load_tokenizer": "tokenizers",
    "prepare": "preparation",
    "prepare_part": "parts",
    "prepare_tokenized": "tokenized",
    "stdlib_files": "stdlib",
    "train_bpe": "tokenizers",
    "verify": "verification",
}

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
    "join_parts",
    "load_tokenizer",
    "prepare",
    "prepare_part",
    "prepare_tokenized",
    "stdlib_files",
    "train_bpe",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
