"""Sampling from a model, one token after the other."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError
from antransformer.models import Cache, Decoder


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    stop: Iterable[int] = (),
    seed: int = 0,
    cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once; yields, step by step, one new token id for each, None for one that has ended.

    The model sees the last ``context`` tokens, so that a text may grow past the context; from there on every token
    costs a pass over all of them. Prompts may differ in length: shorter ones are padded on the left, unseen.

    Args:
        model: in evaluation mode, on any device.
        prompts: token ids, at least one each.
        max_tokens: most tokens to make for a prompt.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the so many likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability (nucleus sampling).
        vocab_size: ids from here on are never sampled; for a model with more rows than the tokenizer has ids.
        stop: a sequence ends before any of these ids, as a rule the end-of-text token.
        seed: of the sampling; prompt number i draws from a generator of its own, seeded with seed + i.
        cache: keep keys and values of earlier tokens; without, every step computes them anew, to the same result.

    Raises:
        ConfigError: no prompt, an empty one, or an option out of range.
        CheckpointError: while generating, if the model's weights are broken.
    """
    if not prompts or not all(prompts):
        raise ConfigError("a prompt has no tokens: give at least one")
    for name, value, ok in (
        ("max_tokens", max_tokens, max_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < float("inf")),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, 0 < top_p <= 1),
        ("seed", seed, 0 <= seed < 2**62),
    ):
        if not ok:
            raise ConfigError(f"{name} {value} is out of range")
    device = model.embedding.weight.device
    generators = [torch.Generator(device).manual_seed(seed + number) for number in range(len(prompts))]
    stop = frozenset(stop)

    def steps() -> Iterator[list[int | None]]:
        ended = [False] * len(prompts)
        for logits, texts in grow(model, prompts, max_tokens, cache):
            tokens = [
                sample(row[:vocab_size], temperature, top_k, top_p, generator)
                for row, generator in zip(logits, generators, strict=True)
            ]
            ended = [done or token in stop for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)

    return steps()


def grow(
    model: Decoder, prompts: Sequence[Sequence[int]], steps: int, keep: bool
) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Yield next-token logits (B, V), float32, and the texts, which the caller appends a token each to."""
    texts, context = [list(prompt) for prompt in prompts], model.config.context
    device, cache = model.embedding.weight.device, None
    for _ in range(steps):
        if keep and cache is not None and cache.length < context:
            new = torch.tensor([text[-1:] for text in texts], device=device)
        else:
            windows = [text[-context:] for text in texts]
            longest = max(len(window) for window in windows)
            padding = [longest - len(window) for window in windows]
            new = torch.tensor(
                [[0] * pad + window for pad, window in zip(padding, windows, strict=True)], device=device
            )
            cache = Cache(model, len(texts), torch.tensor(padding, device=device) if any(padding) else None)
        with torch.no_grad():
            logits = model.logits(model.hidden(new, cache)[:, -1]).float()
        if not logits.isfinite().all():
            raise CheckpointError("the model's logits are not finite: its weights are not those of a sound run")
        yield logits, texts


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits (V,); see ``generate`` for the options."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = torch.sort((logits - logits.amax()) / temperature, descending=True)
    probabilities = logits.softmax(0)
    # A token stays while those before it have less than top_p together; the likeliest one always stays.
    kept = probabilities.cumsum(0) - probabilities < top_p
    kept[top_k or len(kept) :] = False
    probabilities = probabilities * kept
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Pieces of text as their tokens come; a character that is not complete yet waits for its rest."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) > 8:  # no character has more bytes
            yield text
            pending.clear()
    if pending:
        yield tokenizer.decode(pending)
