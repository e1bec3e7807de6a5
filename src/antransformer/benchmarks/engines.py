"""Speed of a trained model in inference engines: prefill and greedy decoding of one sequence.

Each engine loads an export of the same checkpoint and continues the same prompt. Time is measured around requests of 1
and of 1 + ``max_new_tokens`` new tokens: the first is the prefill, and the difference is the decoding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from antransformer.benchmarks.settings import require_positive
from antransformer.benchmarks.timing import Benchmark, alternate, make_rows, now
from antransformer.data import Tokenizer
from antransformer.errors import ConfigError, MissingExtraError
from antransformer.extras import require
from antransformer.inference import generate
from antransformer.inference.folding import folded_where_possible
from antransformer.interop.export import export
from antransformer.interop.llama_cpp import complete, start_server
from antransformer.interop.stock_export import FORMS, check_form
from antransformer.training.checkpointing.checkpoint import Checkpoint, restore

Engine = Callable[[Sequence[int], int], object]  # continues a prompt by a number of new tokens, greedily

CPU = torch.device("cpu")
GGUF_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of ``bench_engines``.

    Attributes:
        dtype: dtype of the weights.
        prompt_tokens: number of tokens of the prompt.
        max_new_tokens: number of tokens to generate after the first.
        rounds: number of timings of each engine.

    Raises:
        ConfigError: a number is less than 1.
    """

    dtype: torch.dtype
    prompt_tokens: int
    max_new_tokens: int
    rounds: int

    def __post_init__(self) -> None:
        require_positive(prompt_tokens=self.prompt_tokens, max_new_tokens=self.max_new_tokens, rounds=self.rounds)


def bench_engines(
    checkpoint: Checkpoint, tokenizer: Tokenizer, settings: EngineSettings, log: Callable[[str], None]
) -> Benchmark:
    """Time all installed engines on the CPU; ``log`` receives progress and the names of missing packages.

    Raises:
        ConfigError: prompt and new tokens exceed the model's context.
        CheckpointError: the model has no standard form that other engines load.
    """
    prompt_tokens, new_tokens, config = settings.prompt_tokens, settings.max_new_tokens, checkpoint.model
    check_form(checkpoint, "gguf")
    if prompt_tokens + new_tokens + 1 > config.context:
        raise ConfigError(
            f"a prompt of {prompt_tokens:,} tokens and {new_tokens + 1:,} new tokens exceed the context of "
            f"{config.context:,}: lower prompt_tokens or max_new_tokens"
        )
    prompt = torch.randint(tokenizer.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        engines = dict(_engines(checkpoint, tokenizer, settings.dtype, folder, log))
        calls = {name: partial(_time, engine, prompt, new_tokens) for name, engine in engines.items()}
        times, problems = alternate(calls, settings.rounds, log)
        del engines, calls  # llama.cpp's servers stop before their files are deleted
    rows = []
    for part, tokens in (("prefill", prompt_tokens), ("decode", new_tokens)):
        rows += make_rows({"part": part}, times.get(part, {}), tokens, problems=problems)
    facts = {
        "model": config.mapping(),
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": new_tokens,
        "dtype": str(settings.dtype),
    }
    return Benchmark("engines", facts, rows)


def _time(engine: Engine, prompt: Sequence[int], new_tokens: int) -> dict[str, float]:
    """Seconds of the prefill with the first new token, and of decoding ``new_tokens`` more."""
    started = now(CPU)
    engine(prompt, 1)
    prefilled = now(CPU)
    engine(prompt, 1 + new_tokens)
    prefill = prefilled - started
    return {"prefill": prefill, "decode": now(CPU) - prefilled - prefill}


def _engines(
    checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype, folder: Path, log: Callable[[str], None]
) -> Iterator[tuple[str, Engine]]:
    """Yield each engine that is installed; the first is this package."""
    model = folded_where_possible(restore(checkpoint, CPU)).to(dtype).eval()
    yield "antransformer", lambda prompt, count: list(generate(model, [prompt], max_new_tokens=count, temperature=0))
    for name, build in (
        ("llama.cpp", partial(_llama_cpp, GGUF_DTYPES[dtype])),
        ("llama.cpp q8_0", partial(_llama_cpp, "q8_0")),
        ("mlx", partial(_mlx, str(dtype).removeprefix("torch."))),
    ):
        try:
            yield name, build(checkpoint, tokenizer, folder)
        except (MissingExtraError, ImportError) as error:
            log(f"skipping {name}: {error}")


def _llama_cpp(dtype: str, checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> Engine:
    require("xllamacpp", "serve")
    file = folder / f"{dtype}.gguf"
    export(checkpoint, tokenizer, file, dtype, format="gguf")
    return partial(complete, start_server(file, threads=torch.get_num_threads()))


def _mlx(dtype: str, checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> Engine:
    """Engine of mlx-lm on the CPU. It chooses its own number of threads."""
    core: Any = import_module("mlx.core")
    load_model: Any = import_module("mlx_lm.utils").load_model
    generate_step: Any = import_module("mlx_lm.generate").generate_step
    core.set_default_device(core.cpu)
    export(checkpoint, tokenizer, folder / "mlx", dtype, format=FORMS[checkpoint.model.architecture])
    model, _ = load_model(folder / "mlx")
    return lambda prompt, count: list(generate_step(core.array(prompt), model, max_tokens=count))
