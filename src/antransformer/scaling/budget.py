"""Turn a budget into a plan: compute, hours on a cluster, or tokens for a size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from antransformer.errors import ConfigError
from antransformer.models import ModelConfig
from antransformer.models.config import PRESETS
from antransformer.scaling import planner
from antransformer.scaling.law_files import nearest_shipped, read_laws
from antransformer.scaling.planner import Cluster, Plan
from antransformer.settings import Count, convert
from antransformer.training.cost_model.throughput import ASSUMED_MFU
from antransformer.training.defaults import parameter_count

MAX_EXCESS = 2.0  # of a plan's compute over the budget, which rounding to whole batches of the smallest model may cause
BUDGETS = "give one budget: --flops, or --hours with --gpus, or --tokens with --size"


def plan_for_budget(
    template: ModelConfig,
    cluster: Cluster,
    *,
    flops: Any = None,
    hours: Any = None,
    tokens: Any = None,
    size: str | int | None = None,
    mfu: Any = None,
    fits: Path | None = None,
) -> Plan:
    """Return the plan for one budget: ``flops``, or ``hours``, or ``tokens`` with ``size``.

    Args:
        template: architecture, vocabulary and context of the model.
        cluster: devices of the run.
        flops: compute 6 N D.
        hours: time on the cluster.
        tokens: length of the run.
        size: preset, or number of parameters such as ``7B``.
        mfu: measured share of the peak; None for the model's estimate.
        fits: JSON of ``antransformer fit``; None for the shipped laws measured nearest.

    Raises:
        ConfigError: not exactly one budget, a value out of range, no law for the architecture, or too little memory.
        DataError: the file of laws cannot be read.
    """
    budgets = {"flops": flops, "hours": hours, "tokens": tokens, "size": size}
    given = {name for name, value in budgets.items() if value is not None}
    if given not in ({"flops"}, {"hours"}, {"tokens", "size"}):
        raise ConfigError(BUDGETS)
    share = None if mfu is None else positive("mfu", mfu)
    if share and share > 1:
        raise ConfigError(f"--mfu must be at most 1, got {mfu}")
    if size is not None:
        run_tokens = _in_range("tokens", convert(tokens, Count, "--tokens"))
        config, wanted = sized(str(size), template)
        compute = 6.0 * run_tokens * parameter_count(config)
        file = read_laws(fits) if fits else nearest_shipped(template.architecture, compute)
        laws = file.by_architecture.get(template.architecture) if file else None
        made = planner.plan_run(config, run_tokens, cluster, laws, share)
        notes = made.notes + planner.size_note("--size", wanted or made.parameters, made.parameters)
        return replace(made, laws=file, notes=notes)
    (name,) = given
    budget = positive(name, budgets[name])
    compute = budget if name == "flops" else cluster.peak_flops * (share or ASSUMED_MFU) * budget * 3600
    file = read_laws(fits) if fits else planner.default_laws(template.architecture, compute)
    make = planner.plan_for_flops if name == "flops" else planner.plan_for_hours
    made = make(budget, template, cluster, file, share)
    if made.compute > MAX_EXCESS * compute:
        raise ConfigError(
            f"--{name} {budget:g} is less than the smallest run needs, {made.compute:.2g} FLOPs: give more"
        )
    return replace(made, laws=file)


def sized(size: str, template: ModelConfig) -> tuple[ModelConfig, int | None]:
    """Return the template in the size of a preset, or with about that number of parameters, and this number."""
    if size.lower() in PRESETS:
        preset = PRESETS[size.lower()]
        return planner.resized(template, preset["width"], preset["layers"]), None
    try:
        parameters = convert(size, Count, "--size")
    except ConfigError:
        raise ConfigError(f"--size must be one of {', '.join(PRESETS)}, or a number such as 7B, got {size}") from None
    return planner.config_of_size(_in_range("size", parameters), template), parameters


def positive(name: str, value: Any) -> float:
    """Return an option's value as a number above 0; raises ``ConfigError`` if it is not one."""
    return _in_range(name, convert(value, float, f"--{name}"))


def _in_range(name: str, value: float) -> float:
    if not 0 < value < 1e30:
        raise ConfigError(f"--{name} must be above 0 and below 1e30, got {value:g}")
    return value
