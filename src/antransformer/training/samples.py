"""Samples of text from a model in training: the start of a new document, and a continuation of the validation text."""

import torch
from torch import Tensor

from antransformer.data import Dataset
from antransformer.inference.folding import folded_where_possible
from antransformer.inference.sampling import generate
from antransformer.models import Decoder
from antransformer.models.factory import build_to_load
from antransformer.training.averaging import WeightAverage
from antransformer.training.distributed.parallel import full_tensor

PROMPT_TOKENS = 16
NEW_TOKENS = 64
TEMPERATURE = 0.8


def prompts(dataset: Dataset, context: int) -> list[list[int]]:
    """Token ids of the prompts: an empty document, and the first tokens of the validation split."""
    first = dataset.split("val").arrays[0][: min(PROMPT_TOKENS, context // 2)]
    return [[dataset.end_of_text], [dataset.end_of_text, *map(int, first)]]


@torch.no_grad()
def samples(model: Decoder, average: WeightAverage | None, dataset: Dataset, is_writer: bool) -> list[str]:
    """Continue every prompt; all ranks call this together, since they gather the weights.

    Args:
        model: model in training, sharded or not.
        average: averaged weights, which are used if there are any.
        dataset: data with the tokenizer and the prompts.
        is_writer: whether this rank generates; the others return an empty list.
    """
    weights: dict[str, Tensor] = dict((model if average is None else average).state_dict())
    # A model without the wrappers for training (sharding, FP8, compilation, recomputation), and without its gradients.
    plain = None
    if is_writer:
        plain = build_to_load(model.config, next(model.parameters()).device).eval()
    target = {} if plain is None else plain.state_dict()
    for name, value in weights.items():
        full = full_tensor(value)
        if plain is not None:
            target[name].copy_(full)
    if plain is None:
        return []
    tokenizer, starts = dataset.tokenizer(), prompts(dataset, model.config.context)
    steps = generate(
        folded_where_possible(plain),
        starts,
        max_new_tokens=min(NEW_TOKENS, max(1, model.config.context // 2)),
        temperature=TEMPERATURE,
        vocab_size=dataset.vocab_size,
        stop=[dataset.end_of_text],
    )
    texts = [start[1:] for start in starts]
    for tokens in steps:
        for text, token in zip(texts, tokens, strict=True):
            text += [] if token is None else [token]
    return [tokenizer.decode(text) for text in texts]
