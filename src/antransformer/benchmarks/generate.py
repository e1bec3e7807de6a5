"""The speed of generation: filling the cache with a prompt, then one token after the other, greedily.

Our architectures stand beside transformers' Qwen3, which is GPT+ but for details (tests/test_parity.py holds that), in
the same shape, with random weights, the same prompt, and one loop for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from antransformer.benchmarks.models import OURS, qwen3_config, replace_architecture
from antransformer.benchmarks.timing import Mode, Row, alternate, compare, now
from antransformer.errors import ConfigError, MissingExtraError
from antransformer.inference import fold
from antransformer.inference.sampling import next_logits
from antransformer.models import Cache, Decoder, ModelConfig, build

Step = Callable[[Tensor, Any], Tensor]  # new tokens (B, T) and the cache to logits (B, V) of the next token

BASELINE = "folded"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is timed.

    Attributes:
        model: the shape; its architecture is angpt, the others take theirs from it.
        batches: numbers of sequences.
        prompt: tokens of each prompt.
        new: tokens to make.
        modes: as written, or through torch.compile.
        rounds: how many times each variant is timed.
        device: where.
        dtype: of weights and cache.

    Raises:
        ConfigError: a number is below 1, or the tokens do not fit the context.
    """

    model: ModelConfig
    batches: tuple[int, ...]
    prompt: int
    new: int
    modes: tuple[Mode, ...]
    rounds: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("new", self.new)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.prompt + self.new > self.model.context:
            raise ConfigError(
                f"a prompt of {self.prompt:,} tokens and {self.new:,} new ones do not fit the context of "
                f"{self.model.context:,}: lower one of them, or raise model.context"
            )


@dataclass(frozen=True)
class GenerationVariant:
    """A model to generate with.

    Attributes:
        cache: an empty cache for a number of sequences.
        prefill: the step that fills it with the prompt.
        decode: the step of a single token.
    """

    cache: Callable[[int], Any]
    prefill: Step
    decode: Step


def bench_generate(settings: Settings, note: Callable[[str], None]) -> list[Row]:
    """Time all variants at every mode and batch; ``note`` is told what begins, and what is left out."""
    variants = ours(settings)
    try:
        variants |= qwen3(settings)
    except MissingExtraError as error:
        note(f"qwen3 is left out: {error}")
    return [
        row
        for mode in settings.modes
        for batch in settings.batches
        for row in timed(variants, settings, mode, batch, note)
    ]


def timed(
    variants: dict[str, GenerationVariant], settings: Settings, mode: Mode, batch: int, note: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of one mode and batch."""
    note(f"{mode}, batch {batch}")
    if mode == "compiled":
        torch.compiler.reset()  # what was compiled for another batch would be made to fit all
        variants = {name: compiled(variant) for name, variant in variants.items()}
    generator = torch.Generator().manual_seed(0)
    shape = (batch, settings.prompt)
    prompt = torch.randint(settings.model.vocab_size, shape, generator=generator).to(settings.device)
    calls = {name: partial(measure, variant, prompt, settings.new) for name, variant in variants.items()}
    times = alternate(calls, settings.rounds)
    for part, tokens in (("prefill", batch * settings.prompt), ("decode", batch * settings.new)):
        yield from compare({"mode": mode, "batch": batch, "part": part}, times[part], tokens, BASELINE)


def measure(variant: GenerationVariant, prompt: Tensor, new: int) -> dict[str, float]:
    """Seconds of both parts for a prompt (B, T), on whose device the model is."""
    cache = variant.cache(len(prompt))
    started = now(prompt.device)
    token = variant.prefill(prompt, cache).argmax(-1, keepdim=True)
    filled = now(prompt.device)
    for _ in range(new):
        token = variant.decode(token, cache).argmax(-1, keepdim=True)
    return {"prefill": filled - started, "decode": now(prompt.device) - filled}


def compiled(variant: GenerationVariant) -> GenerationVariant:
    """The same through torch.compile; of all shapes only the length of the cache changes from call to call."""
    torch._dynamo.config.recompile_limit = 64  # all our models run the same code object
    return replace(
        variant,
        prefill=torch.compile(variant.prefill, dynamic=False, fullgraph=True),
        decode=torch.compile(variant.decode, fullgraph=True),
    )


def ours(settings: Settings) -> dict[str, GenerationVariant]:
    """Our architectures, anGPT folded and as it is trained."""
    torch.manual_seed(0)
    with settings.device:
        models = {name: build(replace_architecture(settings.model, name)) for name in OURS}
    models = {BASELINE: fold(models["angpt"]), **models}
    return {name: our_variant(model.to(settings.dtype).eval()) for name, model in models.items()}


def our_variant(model: Decoder) -> GenerationVariant:
    """One of our models."""

    def step(new: Tensor, cache: Cache) -> Tensor:
        return next_logits(model, new, cache)

    return GenerationVariant(partial(Cache, model), step, step)


def qwen3(settings: Settings) -> dict[str, GenerationVariant]:
    """transformers' Qwen3 of the same shape, with its fused attention and each of its two caches.

    Which cache is faster depends: compiled, the static one in decoding and the growing one in prefill. The static one
    comes first, since torch.compile makes the growing shapes of the other fit every variant after it.

    Raises as ``qwen3_config``.
    """
    config = qwen3_config(settings.model)
    from transformers import DynamicCache, Qwen3ForCausalLM, StaticCache

    with settings.device:
        model: nn.Module = Qwen3ForCausalLM(config)
    model.to(settings.dtype).eval()
    # Since 5.24 it has another name, and the old one costs a warning.
    name = "cache" if "cache" in signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"

    def step(new: Tensor, cache: DynamicCache | StaticCache) -> Tensor:
        with torch.no_grad():  # as a decorator it would cost what compiling gains
            return model(input_ids=new, logits_to_keep=1, **{name: cache}).logits[:, -1].float()

    room = settings.prompt + settings.new
    return {
        "qwen3 static": GenerationVariant(lambda _batch: StaticCache(config=config, max_cache_len=room), step, step),
        "qwen3": GenerationVariant(lambda _batch: DynamicCache(config=config), step, step),
    }
