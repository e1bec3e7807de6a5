"""Training at the paper's optimum: GPT+ against anGPT at 32m by ``antransformer compare``, at three budgets.

The longest budget is as many tokens as ``SECONDS`` allow, at the speed measured first. Later calls continue the
comparison. Its data is the source code of the standard library and of the installed packages, seen at most ``EPOCHS``
times. Both architectures train with the learning rates of the paper's laws, and with the batch of GPT+.
"""

import contextlib
import json
import math
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from antransformer.comparison.findings import PairwiseSpeedup
from antransformer.comparison.statistics import Speedup
from antransformer.data import Dataset, prepare
from antransformer.data.readers import is_readable
from antransformer.data.sources import walk
from antransformer.errors import MachineError
from antransformer.files import replace_text
from antransformer.reporting.labels import format_count
from antransformer.results.comparison import Results
from antransformer.selftest.checks import Check, Setup, Unfinished
from antransformer.selftest.runs import corpus
from antransformer.training.config import resolve_config
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
OPTIONS = "--preset 32m --compile"
MINIATURE_OPTIONS = (
    "--preset pico --model.width 64 --model.layers 1 --model.context 32 --batch-tokens 512 --eval-tokens 1K"
)


def comparison(setup: Setup) -> Iterator[Check]:
    """Losses of both at every budget, and the speedup of anGPT in tokens and in seconds.

    Raises:
        Unfinished: the time of the part has passed; the next call continues.
        MachineError: ``antransformer compare`` failed.
    """
    deadline = time.monotonic() + setup.seconds
    dataset = _data(setup)
    budgets = _budgets(setup, dataset)
    folder = setup.folder / "compare"
    _compare(setup, dataset, budgets, folder, deadline)
    results = Results.load(folder)
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
        longest = (
            16_000 if setup.miniature else min(_affordable(setup, dataset), EPOCHS * dataset.split("train").tokens)
        )
        replace_text(file, json.dumps([round(share * longest) for share in SHARES]))
    budgets: list[int] = json.loads(file.read_text(encoding="utf-8"))
    return budgets


def _affordable(setup: Setup, dataset: Dataset) -> int:
    """Tokens of the longest budget that ``SECONDS`` allow for all runs."""
    settings = {"architecture": ARCHITECTURES[0], "preset": "32m", "recipe": "paper", "compile": True}
    config = resolve_config({**settings, "device": str(setup.device), "data": str(dataset.path)}, dataset.vocab_size)
    trainer = dry_run_trainer(fit_default_micro_batch(config), dataset)
    for step in range(1, WARM_UP_STEPS + TIMED_STEPS + 1):
        trainer.update(step)
        if step == WARM_UP_STEPS:
            torch.accelerator.synchronize(setup.device)
            started = time.perf_counter()
    torch.accelerator.synchronize(setup.device)
    per_token = (time.perf_counter() - started) / (TIMED_STEPS * config.batch_tokens)
    del trainer
    release_memory(setup.device)  # for the comparison, which has processes of its own
    return int(SECONDS / per_token / len(ARCHITECTURES) / sum(SHARES))


def _compare(setup: Setup, dataset: Dataset, budgets: list[int], folder: Path, deadline: float) -> None:
    words = [sys.executable, "-m", "antransformer", "compare", "--architectures", *ARCHITECTURES]
    words += ["--budgets", *map(str, budgets), "--seeds", "1", "--lr-trials", "1", "--tuning-trials", "1"]
    words += ["--data", str(dataset.path), "--out", str(folder), "--devices", str(setup.device), "--recipe", "paper"]
    words += (MINIATURE_OPTIONS if setup.miniature else OPTIONS).split()
    with subprocess.Popen(words) as job:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(max(1.0, deadline - time.monotonic()))
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
            job.wait()
            raise Unfinished("the comparison continues at the next call")
    if job.returncode:
        raise MachineError(f"antransformer compare ended with status {job.returncode}")
