"""Perplexity of a model on plain text, with the definitions of lm_eval's wikitext task."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError
from antransformer.functional import cross_entropy
from antransformer.models import Decoder

Ids = NDArray[np.uint32]
CPU_TOKENS = 1024  # in a forward pass on a CPU; the activations of more tokens leave the cache


class Window(NamedTuple):
    """A stretch of a document that one forward pass reads.

    Attributes:
        ids: tokens of the stretch and the one after it, at most context + 1.
        scored: number of tokens at the end whose log-likelihood counts; the others are only read.
    """

    ids: Ids
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """Scores of a list of documents.

    Attributes:
        loss: negative log-likelihood of all tokens, in nats.
        documents, words, bytes, windows: number of documents, of their words and bytes, and of windows read.
    """

    loss: float
    documents: int
    words: int
    bytes: int
    windows: int

    def metrics(self) -> dict[str, float]:
        """Return the scores under lm_eval's names; infinity for one that overflows."""
        return {
            "word_perplexity": _exp(self.loss / self.words),
            "byte_perplexity": _exp(self.loss / self.bytes),
            "bits_per_byte": self.loss / self.bytes / math.log(2),
        }


def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Score documents in rolling windows: an end-of-text token precedes each document, and each token counts once.

    Args:
        model: model in evaluation mode.
        tokenizer: tokenizer of the model.
        documents: texts, at least one of which is not empty.
        batch_size: largest number of windows in a forward pass.
        progress: called with (windows read, windows in total) after each pass.

    Raises:
        CheckpointError: the loss is not finite.
    """
    encoded = tokenizer.encode_batch(documents)
    windows = [item for ids in encoded for item in rolling_windows(ids, tokenizer.end_of_text, model.config.context)]
    windows.sort(key=lambda window: -len(window.ids))  # equal lengths share a batch; the largest comes first
    on_cpu = model.embedding.weight.device.type == "cpu"
    size = min(batch_size, max(1, CPU_TOKENS // model.config.context)) if on_cpu else batch_size
    batches = [windows[start : start + size] for start in range(0, len(windows), size)]
    loss, done = 0.0, 0
    with parallel_passes(torch.get_num_threads() if on_cpu else 1) as executor:
        for batch, value in zip(batches, executor.map(partial(batch_loss, model), batches), strict=True):
            loss, done = loss + value, done + len(batch)
            if not math.isfinite(loss):
                raise CheckpointError("the loss is not finite: the weights contain NaN or Inf, or training diverged")
            progress(done, len(windows))
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    return Perplexity(loss, len(documents), words, sum(len(text.encode()) for text in documents), len(windows))


def rolling_windows(ids: Ids, first: int, context: int) -> Iterator[Window]:
    """Yield windows that score each token of a document once.

    Windows do not overlap, except that the last one of a long document reaches back to have the full context.

    Args:
        ids: tokens of the document.
        first: token that precedes the document and is not scored.
        context: largest number of tokens that the model reads.
    """
    padded = np.concatenate([np.array([first], ids.dtype), ids])
    for start in range(0, len(ids), context):
        end = min(start + context, len(ids))
        yield Window(padded[max(0, end - context) : end + 1], end - start)


@contextmanager
def parallel_passes(count: int) -> Iterator[ThreadPoolExecutor]:
    """Executor whose threads each run their operations on one core.

    Independent passes need no barriers. Threads that share an operation wait for each other at every operation, which
    costs a multiple of the work if another process uses one of the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    executor = ThreadPoolExecutor(count)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


@torch.inference_mode()
def batch_loss(model: Decoder, windows: Sequence[Window]) -> float:
    """Sum of the losses of the scored tokens, in nats."""
    longest = max(len(window.ids) for window in windows)
    tokens = np.zeros((len(windows), longest), dtype=np.int64)  # padded on the right, where a causal model sees nothing
    scored = np.zeros((len(windows), longest - 1), dtype=bool)
    for row, window in enumerate(windows):
        length = len(window.ids)
        tokens[row, :length] = window.ids
        scored[row, length - 1 - window.scored : length - 1] = True
    device = model.embedding.weight.device
    batch, mask = torch.from_numpy(tokens).to(device), torch.from_numpy(scored).to(device)
    hidden, weight = model.head(model.hidden(batch[:, :-1])[mask])
    return float(cross_entropy(hidden[None], weight, batch[:, 1:][mask][None])) * len(hidden)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
