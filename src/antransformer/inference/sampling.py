"""Sampling of token sequences from a model."""

import hashlib
import math
import operator
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError
from antransformer.models import Cache, Decoder

MAX_TOKENS_PER_CHARACTER = 8  # after more tokens without a complete character, U+FFFD is the text and not a gap


def generate(
    model: Decoder,
    prompts: Iterable[Iterable[SupportsIndex]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    stop: Iterable[SupportsIndex] = (),
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once. Each step yields one new token id per prompt, or None after its end.

    The model sees the last ``context`` tokens. A sequence may grow beyond the context, but from there on every token
    costs a forward pass over the full context. Prompts of different lengths are padded on the left and masked.

    Args:
        model: model in evaluation mode, on any device.
        prompts: token ids of each prompt, at least one, as lists, tensors or arrays.
        max_new_tokens: maximum number of tokens to generate for each prompt.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample only among the K most likely tokens.
        top_p: sample only among the most likely tokens that together have this probability (nucleus sampling), of those
            that ``top_k`` leaves.
        vocab_size: larger ids are never sampled; for models with more logits than the tokenizer has ids.
        stop: ids that end a sequence and are not returned, usually the end-of-text token.
        seed: seed of the first prompt. The generator of prompt i > 0 is seeded with a hash of seed and i.
        use_cache: keep keys and values of earlier tokens. Without the cache every step computes them again, with the
            same result.

    Raises:
        ConfigError: there is no prompt, a prompt is empty or not a sequence of ids of the model, or an option is out of
            range.
        CheckpointError: during generation, if the logits are not finite.
    """
    starts = _token_ids(prompts, model.embedding.weight.shape[0])
    for name, value, valid, permitted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0 and finite"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("vocab_size", vocab_size, vocab_size is None or vocab_size >= 1, "at least 1"),
        ("seed", seed, 0 <= seed < 2**62, "at least 0 and below 2^62"),
    ):
        if not valid:
            raise ConfigError(f"{name} must be {permitted}, got {value}")
    device, context = model.embedding.weight.device, model.config.context
    # One generator per prompt: a sample must not depend on the other prompts of the batch.
    generators = [torch.Generator(device).manual_seed(_prompt_seed(seed, number)) for number in range(len(starts))]
    ends = frozenset(map(operator.index, stop))  # a tensor is not equal to its number as a key

    # A nested generator, so that wrong options raise at the call and not at the first step.
    def steps() -> Iterator[list[int | None]]:
        sequences, ended = [list(start) for start in starts], [False] * len(starts)
        new, cache = window(model, sequences)
        for _ in range(max_new_tokens):
            logits = next_logits(model, new, cache)
            if not math.isfinite(logits.sum()):
                raise CheckpointError("logits are not finite: the weights contain NaN or Inf, or training diverged")
            sampled = sample(logits[:, :vocab_size], temperature, top_k, top_p, generators)
            tokens = sampled.tolist()
            ended = [done or token in ends for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            for sequence, token in zip(sequences, tokens, strict=True):
                sequence.append(token)
            if use_cache and cache.length < context:
                new = sampled.unsqueeze(1)
            else:
                new, cache = window(model, sequences)  # positions shift with the window, so the cache starts anew

    return steps()


def _token_ids(prompts: Iterable[Iterable[SupportsIndex]], count: int) -> list[list[int]]:
    """Return the ids of prompts as lists, which are not empty, or raise ConfigError. Valid ids are below ``count``."""
    try:
        sequences = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise ConfigError("prompts must be sequences of token ids, such as [[1, 2, 3], [4]]") from error
    if not sequences or not all(sequences):
        raise ConfigError("a prompt has no tokens: give at least one")
    for token in (token for sequence in sequences for token in sequence):
        if not 0 <= token < count:
            raise ConfigError(f"prompts must have token ids from 0 to {count - 1}, got {token}")
    return sequences


def _prompt_seed(seed: int, number: int) -> int:
    """Return the seed of the prompt with this number in the batch. The hash keeps consecutive seeds independent."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7])


def window(model: Decoder, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
    """Return the last ``context`` tokens of each sequence, padded on the left, (B, T), and an empty cache."""
    visible = [list(sequence[-model.config.context :]) for sequence in sequences]
    longest = max(len(tokens) for tokens in visible)
    padding = [longest - len(tokens) for tokens in visible]
    device = model.embedding.weight.device
    new = torch.tensor([[0] * pad + tokens for pad, tokens in zip(padding, visible, strict=True)], device=device)
    return new, Cache(model, len(sequences), torch.tensor(padding, device=device) if any(padding) else None)


@torch.no_grad()
def next_logits(model: Decoder, new: Tensor, cache: Cache) -> Tensor:
    """Return the logits (B, V), float32, of the token after ``new`` (B, T), which follows the cached tokens."""
    return model.logits(model.hidden(new, cache)[:, -1]).float()


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return token ids (B,) sampled from logits (B, V), each row with its generator; options as in ``generate``."""
    if temperature < torch.finfo(logits.dtype).tiny:  # dividing by it would overflow, or give 0 / 0
        return logits.argmax(-1)
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is None:
        probabilities, ids = probabilities.sort(descending=True)
    else:
        probabilities, ids = probabilities.topk(min(top_k, probabilities.shape[1]))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    # A token is kept while the more likely ones have less than top_p together. The most likely one is always kept.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    mass = (probabilities * kept).cumsum(-1)
    # Inverse transform sampling: the first token whose cumulative mass exceeds a uniform number.
    uniform = torch.stack([torch.rand(1, generator=generator, device=logits.device) for generator in generators])
    index = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    # Rounding may give an index one past the kept tokens.
    return ids.gather(1, index.minimum(kept.sum(-1, keepdim=True) - 1)).squeeze(1)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of ids piece by piece; the pieces add up to the decoded text.

    An incomplete UTF-8 character is held back until its last byte. A run of byte pieces is held back until its end,
    since the decoder replaces all its bytes by U+FFFD if one is invalid.

    Args:
        tokenizer: tokenizer of the ids.
        ids: ids to decode.
        prompt: ids before them. Many tokenizers drop the space of a token that begins a text.
    """
    incomplete = "\N{REPLACEMENT CHARACTER}"  # at the end of a text, it may become another character
    byte_pieces = tokenizer.byte_pieces()
    known, pending = _last_ids(prompt, byte_pieces), []
    before = tokenizer.decode(known)
    shown = len(before)
    for run in _byte_runs(ids, byte_pieces):
        pending += run
        decoded = tokenizer.decode([*known, *pending])
        if not decoded.startswith(before):  # the new bytes changed the text of a run that the prompt began
            known, shown, decoded = [], 0, tokenizer.decode(pending)
        before = ""
        text = decoded.removesuffix(incomplete)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if text == decoded or len(pending) > MAX_TOKENS_PER_CHARACTER:
            known, pending = _last_ids([*known, *pending], byte_pieces), []
            shown = len(tokenizer.decode(known).removesuffix(incomplete))
    rest = tokenizer.decode([*known, *pending])[shown:]
    if rest:
        yield rest


def _byte_runs(ids: Iterable[int], byte_pieces: Container[int]) -> Iterator[list[int]]:
    """Yield each id in a list of its own, after the byte pieces before it."""
    run = []
    for token in ids:
        run.append(token)
        if token not in byte_pieces:
            yield run
            run = []
    if run:
        yield run


def _last_ids(ids: Sequence[int], byte_pieces: Container[int]) -> list[int]:
    """Return the run of byte pieces at the end and the ids before it that hold the last character whole."""
    start = len(ids)
    while start and ids[start - 1] in byte_pieces:
        start -= 1
    # A part of a character would be decoded as an incomplete one.
    return list(ids[max(0, start - 2 * MAX_TOKENS_PER_CHARACTER) :])
