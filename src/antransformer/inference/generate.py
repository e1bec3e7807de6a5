"""Sampling from a model, one token after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from antransformer.errors import ConfigError
from antransformer.models import Decoder


def generate(
    model: Decoder,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    stop: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` new token ids after ``prompt``.

    The model sees the last ``context`` tokens, so that a text may grow past the context.

    Args:
        model: in evaluation mode, on any device.
        prompt: token ids, at least one.
        max_tokens: most tokens to make.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the so many likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability (nucleus sampling).
        vocab_size: ids from here on are never sampled; for a model with more rows than the tokenizer has ids.
        stop: end before this id, as a rule the end-of-text token.
        seed: of the sampling; the same arguments give the same tokens on one device.

    Raises:
        ConfigError: an empty prompt, or an option out of range.
    """
    if not prompt:
        raise ConfigError("the prompt has no tokens: give at least one")
    for name, value, ok in (
        ("max_tokens", max_tokens, max_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < float("inf")),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not ok:
            raise ConfigError(f"{name} {value} is out of range")
    return _generate(model, prompt, max_tokens, temperature, top_k, top_p, vocab_size, stop, seed)


def _generate(
    model: Decoder,
    prompt: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    vocab_size: int | None,
    stop: int | None,
    seed: int,
) -> Iterator[int]:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        window = torch.tensor([tokens[-model.config.context :]], device=device)
        with torch.no_grad():
            logits = model.logits(model.hidden(window)[:, -1])[0, :vocab_size].float()
        token = sample(logits, temperature, top_k, top_p, generator)
        if token == stop:
            return
        tokens.append(token)
        yield token


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits (V,); see ``generate`` for the options."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = torch.sort(logits / temperature, descending=True)
    probabilities = logits.softmax(0)
    # A token stays while those before it have less than top_p together; the likeliest one always stays.
    kept = probabilities.cumsum(0) - probabilities < top_p
    kept[top_k or len(kept) :] = False
    probabilities = probabilities * kept
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
