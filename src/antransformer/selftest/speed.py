"""Speed and memory: training steps, FP8, fused kernels, CUDA graphs, generation.

The limits are the project's goals for an H100; on other GPUs without a known peak the MFU has no limit. In miniature
nothing has a limit, since such small sizes measure overhead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch

from antransformer.benchmarks.generate import BASELINE, GenerationSettings, bench_generate
from antransformer.benchmarks.loss_and_optimizer import WITH_BOUNDS, bench_optimizer
from antransformer.benchmarks.models import TrainingSetup, our_setup
from antransformer.benchmarks.settings import OUR_ARCHITECTURES, Mode, Settings, replace_architecture
from antransformer.benchmarks.timing import Row, alternate, make_rows, time_call
from antransformer.benchmarks.train_step import StepSettings, bench_step, make_step
from antransformer.errors import MachineError
from antransformer.models import ModelConfig
from antransformer.selftest.checks import Check, Setup, failed, only_on_cuda, triton_kernels
from antransformer.training import float8
from antransformer.training.cost_model.memory import Layout, estimate_memory
from antransformer.training.cost_model.throughput import peak_flops
from antransformer.training.defaults import parameter_count
from antransformer.training.resources import free_memory

PEERS = {"qwen3": "transformers", "x-transformers": "x_transformers", "ngpt-pytorch": "nGPT_pytorch"}  # their modules
OTHERS = (*PEERS, "qwen3 static")  # variants of libraries that may be missing
GENERATORS = {"ours": (BASELINE, *OUR_ARCHITECTURES), "qwen3": (BASELINE, "qwen3 static", "qwen3")}
BATCHES = {"125m": 16, "0.5b": 8}
MFU = {"125m": 0.35, "0.5b": 0.5}
STEP_RATIO = 1.0  # time of anGPT's step over that of GPT+; the paper measures 1.0275
FP8_SPEEDUP = 1.15
STATE_BYTES = 12  # of a parameter: itself and two moments in float32
MEMORY_RANGE = (0.7, 1.2)  # measured over modelled, which does not count what the compiler computes again


def steps(setup: Setup, preset: str, mode: Mode) -> Iterator[Check]:
    """Training steps of a preset, eager or compiled."""
    settings = _step_settings(setup, preset, OUR_ARCHITECTURES, modes=(mode,))
    rows = bench_step(settings, setup.log).rows
    for row in rows:
        name = f"{preset} {mode}, {row.variant}"
        if problem := _problem(name, row):
            yield problem
            continue
        slowdown = 1 / _over_gpt_plus(row, rows)
        compiled = mode == "compiled"
        text = f"{_speed(row)}, step time {slowdown:.3f} of GPT+'s"
        if row.variant == "angpt" and compiled:
            yield _goal(setup, name, slowdown, slowdown <= STEP_RATIO, f"step time <= {STEP_RATIO:.2f}", text)
        else:
            yield Check(name, text)
        if row.utilization is not None and compiled and peak_flops(setup.device, settings.dtype):
            mfu = row.utilization.median
            yield _goal(setup, f"{name}, MFU", mfu, mfu >= MFU[preset], f">= {MFU[preset]}")
        yield _memory(setup, name, row, settings)


def peer(setup: Setup, name: str) -> Iterator[Check]:
    """Compiled steps of another library against GPT+'s; eager in miniature, where compiling takes a while."""
    mode: Mode = "eager" if setup.miniature else "compiled"
    task = f"125m {mode}, {name}"
    if not find_spec(PEERS[name]):
        yield Check(task, "not installed")
        return
    rows = bench_step(_step_settings(setup, "125m", ("gpt+", name), modes=(mode,)), setup.log).rows
    for row in rows:
        if problem := _problem(f"{task} against {row.variant}", row):
            yield problem
        elif row.variant == name:
            yield Check(task, f"{_speed(row)}, {_over_gpt_plus(row, rows):.3f} of GPT+'s speed")


def fp8(setup: Setup) -> Iterator[Check]:
    """Compiled steps of anGPT at 0.5b in FP8 against bfloat16."""
    if float8.is_missing(setup.device):
        yield Check("0.5b compiled, speed in FP8 over bfloat16", "the device has no FP8")
        return
    model = setup.model("0.5b")
    setups = {}
    for name in ("bfloat16", "fp8"):
        with setup.device:
            made = our_setup(model, "angpt")
        if name == "fp8":
            float8.convert(made.model, setup.device)  # type: ignore[arg-type]  # our models are decoders
        setups[name] = made._replace(loss=torch.compile(made.loss, dynamic=False))
    ratio = _ratio(setup, setups, "0.5b")
    yield _goal(setup, "0.5b compiled, speed in FP8 over bfloat16", ratio, ratio >= FP8_SPEEDUP, f">= {FP8_SPEEDUP}")


def cuda_graphs(setup: Setup) -> Iterator[Check]:
    """Compiled steps of a small model with CUDA graphs (mode reduce-overhead) against those without."""
    if setup.device.type != "cuda":
        yield only_on_cuda("CUDA graphs")
        return
    model = ModelConfig(vocab_size=4096, width=256, layers=6, context=256, head_dim=64)
    setups = {}
    for name, mode in (("compiled", None), ("CUDA graphs", "reduce-overhead")):
        with setup.device:
            made = our_setup(model, "angpt")
        setups[name] = made._replace(loss=torch.compile(made.loss, dynamic=False, mode=mode))
    yield Check("width 256, speed with CUDA graphs over compiled", f"{_ratio(setup, setups, '125m', model):.3f}")


def optimizer(setup: Setup) -> Iterator[Check]:
    """Optimizer steps with bounds against those without, with the Triton kernel and with plain torch."""
    settings = Settings(model=setup.model("125m"), device=setup.device, dtype=_dtype(setup), rounds=_rounds(setup))
    for fused in (True, False):
        with triton_kernels(fused):
            rows = bench_optimizer(settings, setup.log).rows
        for row in rows:
            if row.variant == WITH_BOUNDS:
                name = f"125m {row.task['architecture']}, optimizer with bounds over without"
                name += f", {'kernel' if fused else 'plain torch'}"
                yield _problem(name, row) or Check(name, f"{1 / _relative(row):.3f} of the time")


def generation(setup: Setup, mode: Mode, batch: int, group: str) -> Iterator[Check]:
    """Prefill and decode at 125m, of a group of variants from ``GENERATORS``."""
    if setup.miniature and (mode, batch) != ("eager", 1):
        yield only_on_cuda(f"125m {mode}, batch {batch}, {group}")
        return
    if group in PEERS and not find_spec(PEERS[group]):
        yield Check(f"125m {mode}, batch {batch}, {group}", "not installed")
        return
    prompt, new = (16, 8) if setup.miniature else (512, 128)
    settings = GenerationSettings(
        model=setup.model("125m"),
        device=setup.device,
        dtype=_dtype(setup),
        rounds=_rounds(setup),
        batches=(batch,),
        prompt_tokens=prompt,
        max_new_tokens=new,
        modes=(mode,),
        variants=GENERATORS[group],
    )
    for row in bench_generate(settings, setup.log).rows:
        task = f"125m {mode}, batch {batch}, {row.task['part']}, {row.variant}"
        if problem := _problem(task, row):
            yield problem
        elif group == "ours" or row.variant != BASELINE:
            yield Check(task, f"{_speed(row)}, {_relative(row):.3f} of the folded anGPT's speed")


def _memory(setup: Setup, name: str, row: Row, settings: StepSettings) -> Check:
    model = replace_architecture(settings.model, row.variant)
    expected = estimate_memory(model, Layout(micro_batch_size=settings.batch), settings.dtype).total
    assert row.memory is not None
    ratio = row.memory / expected
    low, high = MEMORY_RANGE
    text = f"{row.memory / 2**30:.2f} GiB, {ratio:.2f} of the model's estimate"
    return _goal(setup, f"{name}, peak memory", ratio, low <= ratio <= high, f"{low} to {high}", text)


def _step_settings(setup: Setup, preset: str, variants: Sequence[str], **options: object) -> StepSettings:
    return replace(
        StepSettings(model=setup.model(preset), device=setup.device, dtype=_dtype(setup)),
        variants=tuple(variants),
        batch=2 if setup.miniature else _batch(setup, preset),
        rounds=_rounds(setup),
        **options,  # type: ignore[arg-type]
    )


def _batch(setup: Setup, preset: str) -> int:
    """Batch of the preset, halved until its steps should fit into the free memory."""
    model, batch = setup.model(preset), BATCHES[preset]
    others = STATE_BYTES * parameter_count(model) * (len(OUR_ARCHITECTURES) - 1)  # all variants stay on the device
    while batch > 1:
        step = estimate_memory(model, Layout(micro_batch_size=batch), torch.bfloat16).total
        if MEMORY_RANGE[1] * step + others <= free_memory(setup.device):
            break
        batch //= 2
    if batch < BATCHES[preset]:
        setup.log(f"  {preset}: batch {batch} instead of {BATCHES[preset]}, which would not fit into the free memory")
    return batch


def _ratio(setup: Setup, setups: dict[str, TrainingSetup], preset: str, model: ModelConfig | None = None) -> float:
    """Median ratio of speeds, second setup over first."""
    settings = _step_settings(setup, preset, OUR_ARCHITECTURES)
    settings = replace(settings, model=model or settings.model)
    torch.compiler.reset()
    steps: dict[str, Callable[[], None]] = {name: make_step(each, settings) for name, each in setups.items()}
    timers = {name: partial(time_call, step, setup.device) for name, step in steps.items()}
    times, problems = alternate(timers, settings.rounds, setup.log)
    for name, problem in problems.items():
        raise MachineError(f"{name} failed: {problem}")
    return _relative(make_rows({}, times["total"], 1.0)[-1])


def _goal(setup: Setup, name: str, value: float, met: bool, limit: str, text: str | None = None) -> Check:
    """A check on a device whose speed is judged; elsewhere only the figure."""
    figure = f"{value:.3f}" if text is None else text
    return Check(name, figure) if setup.miniature else Check(name, figure, limit, met)


def _dtype(setup: Setup) -> torch.dtype:
    return torch.float32 if setup.miniature else torch.bfloat16


def _rounds(setup: Setup) -> int:
    return 1 if setup.miniature else 15


def _problem(name: str, row: Row) -> Check | None:
    """Return the check of a row without figures: failed, unless the variant is another library's."""
    if row.problem is None:
        return None
    return Check(name, f"failed: {row.problem}") if row.variant in OTHERS else failed(name, row.problem)


def _speed(row: Row) -> str:
    assert row.speed is not None
    return f"{row.speed.median:,.0f} tokens/s"


def _relative(row: Row) -> float:
    """Speed over the speed of the first row with figures."""
    assert row.ratio is not None
    return row.ratio.median


def _over_gpt_plus(row: Row, rows: Sequence[Row]) -> float:
    """Speed over GPT+'s in the same mode; NaN if GPT+ failed."""
    failures = {other.task["mode"] for other in rows if other.variant == "gpt+" and other.problem}
    return math.nan if row.task["mode"] in failures else _relative(row)
