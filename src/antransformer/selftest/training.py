"""Training at the paper's optimum: GPT+ against anGPT at 32m, as ``antransformer compare`` does it, at three budgets.

The longest budget is as many tokens as ``SECONDS`` allow, at the speed measured first. Later calls continue the
comparison. Its data is the source code of the standard library and of the installed packages, seen at most ``EPOCHS``
times. Both architectures train with the learning rates of the paper's laws, and with the batch of GPT+.
"""

import json
import math
import os
import signal
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from antransformer.benchmarks.timing import now
from antransformer.comparison import compare, report
from antransformer.comparison.experiment import Experiment
from antransformer.comparison.findings import PairwiseSpeedup
from antransformer.comparison.statistics import Speedup
from antransformer.comparison.variants import named_variants
from antransformer.data import Dataset, prepare
from antransformer.data.readers import is_readable
from antransformer.data.sources import walk
from antransformer.errors import RunStoppedError
from antransformer.extras import require_analysis
from antransformer.files import replace_text
from antransformer.progress import ExperimentProgress
from antransformer.reporting.labels import format_count
from antransformer.results.comparison import Results
from antransformer.runs.queue import RunQueue
from antransformer.selftest.checks import Check, Setup, Unfinished
from antransformer.selftest.runs import corpus
from antransformer.training.config import normalize_settings, resolve_config
from antransformer.training.device import release_memory
from antransformer.training.dry_run import dry_run_trainer
from antransformer.training.micro_batch import fit_default_micro_batch

ARCHITECTURES = ("gpt+", "angpt")
SHARES = (0.25, 0.5, 1.0)  # of the longest budget
SECONDS = 1500.0  # of training in all
EPOCHS = 4
VOCABULARY = 16_384
CORPUS_BYTES = 200_000_000
WARM_UP_STEPS, TIMED_STEPS = 5, 20
STOP_SECONDS = 20.0  # in which active runs save a checkpoint
OPTIONS: dict[str, Any] = {"preset": "32m", "compile": True}
MINIATURE_OPTIONS: dict[str, Any] = {
    "preset": "pico",
    "model": {"width": 64, "layers": 1, "context": 32},
    "batch_tokens": 512,
    "eval_tokens": 1024,
}
MINIATURE_TOKENS = 16_000


def comparison(setup: Setup) -> Iterator[Check]:
    """Losses of both at every budget, and the speedup of anGPT in tokens and in seconds.

    Raises:
        Unfinished: the time of the call has passed; the next call continues.
        MissingExtraError: the extra ``analysis`` is not installed, which the report needs.
        MachineError: a run failed.
    """
    require_analysis()
    dataset = _data(setup)
    budgets = _budgets(setup, dataset)
    folder = setup.folder / "compare"
    results = _compare(setup, dataset, budgets, folder)
    for tokens in results.budgets:
        losses = [float(variant.losses([tokens], results.seeds).mean()) for variant in results.variants]
        name = f"{format_count(tokens)} tokens, seed {results.seeds[0]}: loss of {' and '.join(ARCHITECTURES)}"
        yield Check(name, " and ".join(f"{loss:.4f}" for loss in losses))
    pair = PairwiseSpeedup.measure(results, results.variants[1], results.baseline)
    for tokens, point in zip(results.budgets, pair.points, strict=False):
        yield Check(f"{format_count(tokens)} tokens: speedup of angpt in tokens", _ratio(pair, point))
    seconds = [variant.seconds_per_step for variant in results.variants]
    yield Check("time of anGPT's step over GPT+'s", f"{seconds[1] / seconds[0]:.3f}")
    setup.log(f"loss curves: {folder / 'report.html'}")


def _ratio(pair: PairwiseSpeedup, point: Speedup) -> str:
    bound = {0.0: "<", math.inf: ">"}.get(point.ratio, "")
    return f"{bound}{pair.clamp_to_bound(point, point.ratio):.2f}x"


def _data(setup: Setup) -> Dataset:
    if setup.miniature:
        return corpus(setup)
    folder = setup.folder / "packages"
    if not folder.exists():
        setup.log("preparing the source code of the standard library and of the installed packages")
        files, size = [], 0
        packages = walk(Path(sysconfig.get_path("purelib")), excluded=("__pycache__",))
        for path in (*walk(Path(sysconfig.get_path("stdlib")), excluded=("__pycache__", "site-packages")), *packages):
            if path.suffix == ".py" and size < CORPUS_BYTES and is_readable(path):
                files.append(path)
                size += path.stat().st_size
        prepare(files, folder, bpe_vocab_size=VOCABULARY)
    return Dataset.open(folder, verify=False)


def _budgets(setup: Setup, dataset: Dataset) -> list[int]:
    """Budgets of the comparison, chosen at the first call."""
    file = setup.folder / "budgets.json"
    if not file.exists():
        available = MINIATURE_TOKENS if setup.miniature else EPOCHS * dataset.split("train").tokens
        longest = min(_affordable(setup, dataset), available)
        replace_text(file, json.dumps([round(share * longest) for share in SHARES]))
    budgets: list[int] = json.loads(file.read_text(encoding="utf-8"))
    return budgets


def _settings(setup: Setup, dataset: Dataset) -> dict[str, Any]:
    """Settings of all runs."""
    options = MINIATURE_OPTIONS if setup.miniature else OPTIONS
    return normalize_settings({"data": str(dataset.path), "recipe": "paper", **options}, "settings")


def _affordable(setup: Setup, dataset: Dataset) -> int:
    """Tokens of the longest budget that ``SECONDS`` allow for all runs."""
    settings = {**_settings(setup, dataset), "device": str(setup.device), "architecture": ARCHITECTURES[0]}
    config = resolve_config(settings, dataset.vocab_size)
    trainer = dry_run_trainer(fit_default_micro_batch(config), dataset)
    for step in range(1, WARM_UP_STEPS + TIMED_STEPS + 1):
        trainer.update(step)
        if step == WARM_UP_STEPS:
            started = now(setup.device)
    per_token = (now(setup.device) - started) / (TIMED_STEPS * config.batch_tokens)
    del trainer
    release_memory(setup.device)  # for the comparison, which has processes of its own
    return int(SECONDS / per_token / len(ARCHITECTURES) / sum(SHARES))


def _compare(setup: Setup, dataset: Dataset, budgets: list[int], folder: Path) -> Results:
    """Run the comparison, or what is left of it; a signal stops it in time."""
    settings, variants = _settings(setup, dataset), named_variants(ARCHITECTURES)
    planned = compare.plan(settings, variants, budgets, seeds=1, lr_trials=1, tuning_trials=1)
    # Not by the verb, which first times steps of both, to estimate the work that is left.
    display = ExperimentProgress()
    experiment = Experiment(
        planned, dataset, RunQueue(folder / "runs", dataset, [str(setup.device)], display), display.stage
    )
    stop = setup.deadline - STOP_SECONDS
    left = min(stop - time.monotonic(), threading.TIMEOUT_MAX)
    timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with display:
            results = experiment.run()
    except (RunStoppedError, KeyboardInterrupt) as error:
        if time.monotonic() < stop:  # the user's signal
            raise
        raise Unfinished("the comparison continues at the next call") from error
    finally:
        timer.cancel()
    results.save(folder)
    report.write(results, folder)
    return results
