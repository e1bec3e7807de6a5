"""Sampling from a model, one token after the other."""

import math
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
    device, context = model.embedding.weight.device, model.config.context
    generators = [torch.Generator(device).manual_seed(seed + number) for number in range(len(prompts))]
    stop = frozenset(stop)

    def steps() -> Iterator[list[int | None]]:
        texts, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
        new, kept = window(model, texts)
        for _ in range(max_tokens):
            logits = next_logits(model, new, kept)
            if not math.isfinite(logits.sum()):
                raise CheckpointError("the model's logits are not finite: its weights are not those of a sound run")
            chosen = sample(logits[:, :vocab_size], temperature, top_k, top_p, generators)
            tokens = chosen.tolist()
            ended = [done or token in stop for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            new, kept = (chosen.unsqueeze(1), kept) if cache and kept.length < context else window(model, texts)

    return steps()


def window(model: Decoder, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
    """The last ``context`` tokens of each text, padded on the left to one length, (B, T), and an empty cache."""
    seen = [list(text[-model.config.context :]) for text in texts]
    longest = max(len(tokens) for tokens in seen)
    padding = [longest - len(tokens) for tokens in seen]
    device = model.embedding.weight.device
    new = torch.tensor([[0] * pad + tokens for pad, tokens in zip(padding, seen, strict=True)], device=device)
    return new, Cache(model, len(texts), torch.tensor(padding, device=device) if any(padding) else None)


@torch.no_grad()
def next_logits(model: Decoder, new: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V), float32, of the token behind the new ones (B, T), which follow those of the cache."""
    return model.logits(model.hidden(new, cache)[:, -1]).float()


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Token ids (B,) from logits (B, V), each row with its generator; see ``generate`` for the options."""
    if temperature < torch.finfo(logits.dtype).tiny:  # nothing else would be left, or 0 / 0
        return logits.argmax(-1)
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is None:
        probabilities, ids = probabilities.sort(descending=True)
    else:
        probabilities, ids = probabilities.topk(min(top_k, probabilities.shape[1]))
    # A token stays while those before it have less than top_p together; the likeliest one always stays.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    mass = (probabilities * kept).cumsum(-1)
    drawn = torch.stack([torch.rand(1, generator=generator, device=logits.device) for generator in generators])
    place = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)  # the first whose mass lies above
    return ids.gather(1, place.minimum(kept.sum(-1, keepdim=True) - 1)).squeeze(1)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Pieces of text as their tokens come; a character that is not complete yet waits for its rest.

    Args:
        tokenizer: of the ids.
        ids: to be spelled.
        before: ids of the text that they go on from; many a tokenizer drops the space of a token that begins a text.
    """
    known, pending = list(before[-1:]), []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode([*known, *pending])
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) > 8:  # no character has more bytes
            yield text.removeprefix(tokenizer.decode(known))
            known, pending = pending, []
    if pending:
        yield tokenizer.decode([*known, *pending]).removeprefix(tokenizer.decode(known))
