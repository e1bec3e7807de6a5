"""Compare architectures, and variants of one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from antransformer.api.arguments import checked
from antransformer.comparison import ablate as ablations
from antransformer.comparison import compare as comparisons
from antransformer.comparison import report
from antransformer.comparison.estimate import estimate
from antransformer.comparison.experiment import Experiment, Plan
from antransformer.comparison.variants import named_variants, read_variants
from antransformer.data.mixture import open_mixture
from antransformer.data.stdlib import NAME as STDLIB
from antransformer.errors import ConfigError
from antransformer.extras import require_analysis
from antransformer.lock import lock
from antransformer.progress import ExperimentProgress, log, open_dataset
from antransformer.results.comparison import Results
from antransformer.results.folder import require_own_folder
from antransformer.runs import shared_settings
from antransformer.runs.queue import RunQueue, available_devices
from antransformer.settings import Count, convert
from antransformer.training.config import normalize_settings

DEFAULT_ARCHITECTURES = ("gpt+", "angpt")


@checked
def compare(
    architectures: Sequence[str] | None = None,
    *,
    out: str | Path,
    variants: str | Path | Mapping[str, Any] | None = None,
    tokens: int | str | None = None,
    budgets: Sequence[int | str] = (),
    quick: bool = False,
    seeds: int = 3,
    lr_trials: int = 3,
    tuning_trials: int | None = None,
    separate_rates: bool | None = None,
    trial_tokens: int | str = 0,
    devices: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Results:
    """Compare architectures tuned by the same search, with several seeds; writes ``report.html`` to ``out``.

    Finished runs in ``out`` are skipped and interrupted runs resume.

    Args:
        architectures: the first is the baseline (default ``gpt+`` and ``angpt``). A suffix selects a recipe or an
            optimizer for one of them, as in ``angpt-best`` or ``angpt-normuon``.
        out: folder of the runs and the report.
        variants: instead of ``architectures``, settings for each variant by its name, or a YAML file of them. The
            first is the baseline. Settings that are given are not searched. The key ``budgets`` holds settings for
            single budgets, as in ``{"angpt": {"budgets": {"5M": {"lr": 0.01}, "10M": {"lr": 0.007}}}, "gpt+": {}}``.
        tokens: largest budget (default 8M); a quarter and a half of it are run too.
        budgets: budgets in tokens, instead of ``tokens``.
        quick: use a small size, small budgets and recipe paper, about an hour on two cores.
        seeds: measured seeds per budget.
        lr_trials: learning rates to try at each budget; 1 keeps the default.
        tuning_trials: values to try of each architecture's own hyperparameters (default 3); 1 keeps the defaults.
        separate_rates: whether to search the learning rates of embedding, head and, with Adam, vectors too, with
            ``tuning_trials`` values each (default: unless ``tuning_trials`` is 1).
        trial_tokens: search at this budget only and use the result at every budget; 0 searches at every budget.
        devices: one worker for each, such as ``["cuda:0", "cuda:1"]``.
        workers: number of workers if no devices are given.
        progress: whether to show progress.
        settings: settings of all runs, such as ``data``, ``preset``, ``batch_tokens`` and ``model={...}``.

    Raises:
        ConfigError, DataError: wrong settings, or ``out`` holds another experiment.
        RunStoppedError, MachineError: SIGINT, SIGTERM or SIGHUP arrived, or a worker failed; finished runs are kept.
    """
    shared = _shared_settings(settings, quick)
    if architectures is not None and variants is not None:
        raise ConfigError("architectures and variants exclude each other: give one of them")
    if variants is None:
        own = named_variants(DEFAULT_ARCHITECTURES if architectures is None else architectures)
    else:
        own = read_variants(variants)
    if tokens is not None and budgets:
        raise ConfigError("tokens and budgets exclude each other: give one of them")
    if quick and tokens is None and not budgets:
        budgets = comparisons.QUICK_BUDGETS
    tuning_trials = 3 if tuning_trials is None else tuning_trials
    planned = comparisons.plan(
        shared,
        own,
        comparisons.budgets_of(convert("8M" if tokens is None else tokens, Count, "tokens"), budgets),
        tuning_trials > 1 if separate_rates is None else separate_rates,
        seeds=seeds,
        lr_trials=lr_trials,
        tuning_trials=tuning_trials,
        trial_tokens=convert(trial_tokens, Count, "trial_tokens"),
    )
    return _run_experiment(planned, Path(out), devices, workers, progress)


@checked
def ablate(
    only: Sequence[str] = (),
    *,
    out: str | Path,
    tokens: int | str | None = None,
    quick: bool = False,
    seeds: int = 3,
    lr_trials: int = 1,
    trial_tokens: int | str = 0,
    devices: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Results:
    """Train anGPT and variants that change one part of it each; writes ``report.html`` to ``out``.

    ``seeds``, ``lr_trials``, ``trial_tokens``, ``devices``, ``workers``, ``progress`` and settings are as in
    ``compare``.

    Args:
        only: names of variants, or patterns such as ``all-*``; empty selects all.
        out: folder of the runs and the report.
        tokens: length of each run (default 1M; with ``quick`` 500K).
        quick: use the preset, recipe, batch and validation of ``compare(quick=True)``.

    Raises:
        ConfigError, DataError, RunStoppedError, MachineError: as in ``compare``.
    """
    default = "500K" if quick else "1M"
    length = convert(default if tokens is None else tokens, Count, "tokens")
    planned = ablations.plan(
        _shared_settings(settings, quick),
        only,
        [length],
        seeds=seeds,
        lr_trials=lr_trials,
        trial_tokens=convert(trial_tokens, Count, "trial_tokens"),
    )
    return _run_experiment(planned, Path(out), devices, workers, progress)


def _shared_settings(settings: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    shared = normalize_settings(settings, "settings")
    shared_settings.require_shared(shared, shared_settings.TRAINING, shared_settings.MODEL)
    return {**comparisons.QUICK, **shared} if quick else shared


def _run_experiment(plan: Plan, folder: Path, devices: Sequence[str], workers: int | None, progress: bool) -> Results:
    require_analysis()
    require_own_folder(folder, plan.kind)
    queue_devices = available_devices(devices, workers)
    dataset = open_mixture(plan.common.get("data", STDLIB), None, partial(open_dataset, progress=progress))
    display = ExperimentProgress(enabled=progress)
    experiment = Experiment(plan, dataset, RunQueue(folder / "runs", dataset, queue_devices, display), display.stage)
    experiment.require_own_runs()
    if progress:
        expected = estimate(experiment, log)
        if expected.runs[1]:
            log(f"to do: {expected}")
    with lock(folder):
        with display:
            results = experiment.run()
        results.save(folder)
        report.write(results, folder)
    return results
