"""Speed of greedy generation: prefill (filling the cache with a prompt) and decode (one token after another).

Our architectures are timed against Qwen3 of transformers, which equals GPT+ except for details (see
``tests/models/test_parity.py``). All have the same shape, random weights, the same prompt, and the same loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from antransformer.benchmarks.models import qwen3_config
from antransformer.benchmarks.settings import (
    OUR_ARCHITECTURES,
    Mode,
    Settings,
    replace_architecture,
    require_distinct,
    require_positive,
)
from antransformer.benchmarks.timing import Benchmark, Row, alternate, describe_error, make_rows, now
from antransformer.errors import ConfigError, MissingExtraError
from antransformer.inference import fold
from antransformer.inference.sampling import next_logits
from antransformer.models import Cache, Decoder, build

Step = Callable[[Tensor, Any], Tensor]  # new token ids (B, T) and the cache -> logits (B, V) of the next token

BASELINE = "folded"  # anGPT with its factors folded into the weights
VARIANTS = (BASELINE, *OUR_ARCHITECTURES, "qwen3 static", "qwen3")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """Settings of ``bench_generate``; weights and cache have ``dtype``.

    Attributes:
        batches: numbers of sequences.
        prompt_tokens: number of tokens of each prompt.
        max_new_tokens: number of tokens to generate.
        modes: eager execution, ``torch.compile``, or both.
        variants: names of the variants to time.

    Raises:
        ConfigError: a number is less than 1, a batch is given twice, or the tokens do not fit into the context.
    """

    batches: tuple[int, ...]
    prompt_tokens: int
    max_new_tokens: int
    modes: tuple[Mode, ...] = ("eager",)
    variants: tuple[str, ...] = VARIANTS

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(batch=min(self.batches), prompt_tokens=self.prompt_tokens, max_new_tokens=self.max_new_tokens)
        require_distinct(batch=self.batches)
        if self.prompt_tokens + self.max_new_tokens > self.model.context:
            raise ConfigError(
                f"a prompt of {self.prompt_tokens:,} tokens and {self.max_new_tokens:,} new tokens exceed the context "
                f"of {self.model.context:,}: lower one of them, or raise model.context"
            )


@dataclass(frozen=True)
class GenerationVariant:
    """A model to generate with.

    Attributes:
        new_cache: makes an empty cache for a number of sequences.
        prefill: step that fills the cache with the prompt.
        decode: step of a single token.
    """

    new_cache: Callable[[int], Any]
    prefill: Step
    decode: Step


def bench_generate(settings: GenerationSettings, log: Callable[[str], None]) -> Benchmark:
    """Time all variants in every mode and with every batch; ``log`` receives progress and skipped variants."""
    variants, problems = _our_variants(settings), {}
    try:
        if "qwen3" in settings.variants:
            variants |= _qwen3_variants(settings)
    except MissingExtraError as error:
        log(f"skipping qwen3: {error}")
    except Exception as error:  # other releases of transformers may raise anything
        problems["qwen3"] = describe_error(error)
        log(f"qwen3 failed: {problems['qwen3']}")
    variants = {name: variant for name, variant in variants.items() if name in settings.variants}
    rows = []
    for mode in settings.modes:
        for batch in settings.batches:
            log(f"{mode}, batch {batch}")
            rows += _time_batch(variants, problems, settings, mode, batch, log)
    facts = {
        "model": settings.model.mapping(),
        "prompt_tokens": settings.prompt_tokens,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": str(settings.dtype),
        "baseline": BASELINE,
    }
    return Benchmark("generate", facts, rows)


def _time_batch(
    variants: dict[str, GenerationVariant],
    problems: dict[str, str],
    settings: GenerationSettings,
    mode: Mode,
    batch: int,
    log: Callable[[str], None],
) -> list[Row]:
    if mode == "compiled":
        torch.compiler.reset()  # otherwise dimensions that differ between batches become dynamic, which is slower
        variants = {name: _compiled(variant) for name, variant in variants.items()}
    generator = torch.Generator().manual_seed(0)
    shape = (batch, settings.prompt_tokens)
    prompt = torch.randint(settings.model.vocab_size, shape, generator=generator).to(settings.device)
    calls = {name: partial(_time_parts, item, prompt, settings.max_new_tokens) for name, item in variants.items()}
    times, failed = alternate(calls, settings.rounds, log)
    problems = {**problems, **failed}
    rows = []
    for part, tokens in (("prefill", settings.prompt_tokens), ("decode", settings.max_new_tokens)):
        task = {"mode": mode, "batch": batch, "part": part}
        rows += make_rows(task, times.get(part, {}), batch * tokens, BASELINE, problems)
    return rows


def _time_parts(variant: GenerationVariant, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds of prefill and decode for a prompt (B, T) on the model's device."""
    cache = variant.new_cache(len(prompt))
    started = now(prompt.device)
    token = variant.prefill(prompt, cache).argmax(-1, keepdim=True)
    prefilled = now(prompt.device)
    for _ in range(new_tokens):
        token = variant.decode(token, cache).argmax(-1, keepdim=True)
    return {"prefill": prefilled - started, "decode": now(prompt.device) - prefilled}


def _compiled(variant: GenerationVariant) -> GenerationVariant:
    """Compile both steps; in decode, only the length of the cache is a dynamic shape."""
    torch._dynamo.config.recompile_limit = 64  # all our models share one code object, and each recompiles it
    return replace(
        variant,
        prefill=torch.compile(variant.prefill, dynamic=False, fullgraph=True),
        decode=torch.compile(variant.decode, fullgraph=True),
    )


def _our_variants(settings: GenerationSettings) -> dict[str, GenerationVariant]:
    """Our architectures as trained, and anGPT folded."""
    torch.manual_seed(0)
    with settings.device:
        models = {name: build(replace_architecture(settings.model, name)) for name in OUR_ARCHITECTURES}
    models = {BASELINE: fold(models["angpt"]), **models}
    return {name: _our_variant(model.to(settings.dtype).eval()) for name, model in models.items()}


def _our_variant(model: Decoder) -> GenerationVariant:
    def step(tokens: Tensor, cache: Cache) -> Tensor:
        return next_logits(model, tokens, cache)

    return GenerationVariant(partial(Cache, model), step, step)


def _qwen3_variants(settings: GenerationSettings) -> dict[str, GenerationVariant]:
    """Qwen3 of transformers with fused attention, once with each of its two caches.

    Compiled, the static cache is faster in decode and the dynamic one in prefill. The static one is first, because
    compiling the growing shapes of the dynamic cache makes the shapes of later variants dynamic.

    Raises:
        MissingExtraError: transformers is not installed, or too old.
    """
    config = qwen3_config(settings.model)
    from transformers import DynamicCache, Qwen3ForCausalLM, StaticCache

    with settings.device:
        model: nn.Module = Qwen3ForCausalLM(config)
    model.to(settings.dtype).eval()
    # transformers 5.24 renamed the parameter; the old name causes a warning.
    name = "cache" if "cache" in signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"

    def step(tokens: Tensor, cache: DynamicCache | StaticCache) -> Tensor:
        with torch.no_grad():  # as a decorator it would cancel the gain of compiling
            logits: Tensor = model(input_ids=tokens, logits_to_keep=1, **{name: cache}).logits[:, -1].float()
            return logits

    length = settings.prompt_tokens + settings.max_new_tokens
    return {
        "qwen3 static": GenerationVariant(lambda _batch: StaticCache(config=config, max_cache_len=length), step, step),
        "qwen3": GenerationVariant(lambda _batch: DynamicCache(config=config), step, step),
    }
