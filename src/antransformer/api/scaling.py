"""Measure, fit and use scaling laws."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from antransformer.api.arguments import checked
from antransformer.data.mixture import open_mixture
from antransformer.data.stdlib import NAME as STDLIB
from antransformer.errors import ConfigError
from antransformer.extras import require, require_analysis
from antransformer.lock import lock
from antransformer.models import ModelConfig, registry
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.progress import ExperimentProgress, log, open_dataset
from antransformer.results.folder import require_own_folder
from antransformer.results.observations import BestSettings, read_observations, read_table
from antransformer.results.sweep import Sweep
from antransformer.runs import shared_settings
from antransformer.runs.queue import RunQueue, available_devices
from antransformer.scaling import fits as laws
from antransformer.scaling.budget import BUDGETS, plan_for_budget, positive
from antransformer.scaling.planner import Cluster, Plan
from antransformer.settings import nearest
from antransformer.sweeps import options, report
from antransformer.sweeps.estimate import estimate
from antransformer.sweeps.sweep import Sweeper, check_choices
from antransformer.sweeps.sweep import plan as plan_sweep
from antransformer.training.config import normalize_settings
from antransformer.training.cost_model.throughput import GPUS

LOG = logging.getLogger(__name__)


@checked
def sweep(
    *,
    out: str | Path,
    architectures: Sequence[str] = ("angpt",),
    sizes: Sequence[str] = ("nano",),
    widths: Sequence[int | str] = (),
    batch_tokens: Sequence[int | str] = (),
    lrs: Sequence[float | str] = (),
    lr_trials: int | None = None,
    tokens: Sequence[int | str] = (),
    tokens_per_param: Sequence[float | str] = (),
    seeds: int = 1,
    devices: Sequence[str] = (),
    workers: int | None = None,
    max_hours: float | None = None,
    progress: bool = False,
    **settings: Any,
) -> Sweep:
    """Search the best learning rate and batch of every size; writes ``report.html`` to ``out``.

    Finished runs in ``out`` are skipped, interrupted runs resume, and new values are added to its results.
    ``devices``, ``workers`` and ``progress`` are as in ``compare``.

    Args:
        out: folder of the runs and the report.
        architectures: all get the same grid, each around its own default learning rate.
        sizes: presets; all get the longest context among them.
        widths: widths to try instead of the width of the only size; depth, batch and tokens stay the same.
        batch_tokens: tokens per step to try; by default one value, chosen by the first architecture and the size.
        lrs: learning rates to try; by default a grid around the default, extended while the best is at an edge.
        lr_trials: initial length of that grid (default 5).
        tokens: lengths of the runs.
        tokens_per_param: lengths in tokens per parameter, instead of ``tokens`` (default 20, or 2M tokens for widths).
        seeds: runs at each point of the grid.
        max_hours: refuse a sweep that is estimated to take longer; the estimate times a few steps of every size.
        settings: settings of all runs, such as ``data``, ``eval_tokens`` and ``model={...}``. The default recipe is
            paper, whose scaling laws ``plan`` uses.

    Raises:
        ConfigError, DataError, RunStoppedError, MachineError: as in ``compare``.
    """
    require_analysis()
    for name, number in (("seeds", seeds), ("lr_trials", lr_trials)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
    folder = Path(out)
    shared = {"recipe": "paper", **normalize_settings(settings, "settings")}
    shared_settings.require_shared(shared, shared_settings.SWEEP_TRAINING, shared_settings.SWEEP_MODEL)
    require_own_folder(folder, "sweep")
    grid = options.grid_options(sizes, widths, batch_tokens, lrs, lr_trials, tokens, tokens_per_param)
    check_choices(architectures, sizes, grid["widths"], grid["lrs"])
    queue_devices = available_devices(devices, workers)
    dataset = open_mixture(shared.get("data", STDLIB), None, partial(open_dataset, progress=progress))
    planned = plan_sweep(shared, dataset.vocab_size, architectures, sizes, **grid, seeds=seeds)
    options.earlier_sweep(folder, dataset, planned)  # its errors come before the estimate
    display = ExperimentProgress(enabled=progress)
    sweeper = Sweeper(planned, dataset, RunQueue(folder / "runs", dataset, queue_devices, display), display.stage)
    if max_hours is not None or progress:
        expected = estimate(sweeper, log if progress else LOG.info)
        if progress and expected.runs[1]:
            log(f"to do: {expected}")
        if max_hours is not None and expected.hours[1] > max_hours:
            raise ConfigError(
                f"this takes up to {expected.hours[1]:.1f} hours on this machine, more than {max_hours:g}: "
                "raise max_hours to start it (--yes)"
            )
    with lock(folder):
        earlier = options.earlier_sweep(folder, dataset, planned)  # another call may have ended during the estimate
        with display:
            results = sweeper.run(earlier)
        if earlier:
            results = results.merged_with(earlier)
        results.save(folder)
        report.write(results, folder)
    return results


@checked
def fit(
    results: Sequence[str | Path] = (), *, optima: str | Path | None = None, bins: int | None = None
) -> list[laws.Fit]:
    """Fit scaling laws to measured losses, or to best settings; returns the laws of each architecture.

    Args:
        results: folders of sweeps and comparisons, or CSV files with one finished run per row.
        optima: CSV file of best settings, instead of ``results``.
        bins: log-spaced bins of compute; by default four per decade.

    Raises:
        ConfigError: neither or both of ``results`` and ``optima`` are given, or ``bins`` is below 1.
        DataError: a file cannot be read, runs of an architecture were trained differently, or none has two sizes
            or two lengths.
    """
    if bool(results) == bool(optima):
        raise ConfigError("give either RESULTS (folders or CSV files with losses) or --optima FILE")
    if bins is not None and bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}")
    require("scipy", "analysis")
    if optima:
        return laws.fit_optima(read_table(Path(optima), BestSettings))
    return laws.fit(read_observations([Path(path) for path in results]), bins)


@checked
def plan(
    *,
    flops: float | str | None = None,
    hours: float | str | None = None,
    tokens: int | str | None = None,
    size: int | str | None = None,
    architecture: str = "angpt",
    context: int = 2048,
    vocab_size: int = PAPER_VOCABULARY,
    gpus: int | None = None,
    gpu: str = "h100",
    gpus_per_machine: int = 8,
    network: float | str = 400.0,
    mfu: float | str | None = None,
    fits: str | Path | None = None,
) -> Plan:
    """Plan a run for a budget: size, tokens, batch, learning rate, parallelism, memory and time.

    The budget is ``flops``, or ``hours`` with ``gpus``, or ``tokens`` with ``size``.

    Args:
        flops: compute in FLOPs, counted as 6 N D.
        hours: time on ``gpus``.
        tokens: length of the run.
        size: preset, or number of parameters such as ``"7B"``.
        architecture: architecture of the model.
        context: longest sequence in tokens.
        vocab_size: vocabulary size of the tokenizer.
        gpus: number of GPUs (default 8).
        gpu: GPU model, such as ``h100``.
        gpus_per_machine: GPUs per node.
        network: bandwidth between nodes in Gbit/s per GPU.
        mfu: measured model FLOPs utilization; None estimates it.
        fits: JSON file of ``antransformer fit``; None selects the shipped laws measured nearest.

    Raises:
        ConfigError: the budget or an option is wrong, or the model does not fit in memory.
        DataError: ``fits`` cannot be read.
    """
    if hours is not None and gpus is None:
        raise ConfigError(BUDGETS)
    template = ModelConfig.preset(
        "32m", _choice("architecture", architecture, registry.names()), vocab_size, context=context
    )
    bandwidth = positive("network", network) * 1e9 / 8  # bytes/s
    cluster = Cluster(_choice("gpu", gpu, GPUS), 8 if gpus is None else gpus, gpus_per_machine, bandwidth)
    return plan_for_budget(
        template,
        cluster,
        flops=flops,
        hours=hours,
        tokens=tokens,
        size=size,
        mfu=mfu,
        fits=None if fits is None else Path(fits),
    )


def _choice(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    value = value if value in known else value.lower()
    if value not in known:
        raise ConfigError(f"unknown --{name} {value}{nearest(value, known)} (choose from {', '.join(known)})")
    return value
