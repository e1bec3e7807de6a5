"""Adapter of exported models to lm_eval, and lm_eval's tasks with data of the hub or of local files. Needs lm_eval."""

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.interop import local_tasks as task_data
from antransformer.interop.modeling_antransformer import AntransformerForCausalLM
from antransformer.settings import nearest

# lm_eval would start a pool of processes for the standard error of a perplexity, which costs more than it saves.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

FOLDERS = ("arc", "blimp", "hellaswag", "lambada", "piqa", "wikitext", "winogrande")
BOOTSTRAP = 1000  # resamples for the standard error of a perplexity
SEED = 1234  # lm_eval's default for the choice of few-shot examples
LOGGERS = ("lm_eval", "huggingface_hub", "datasets", "transformers")

Tasks = dict[str, Any]
Progress = Callable[[int, int], None]


class Scorer(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """lm_eval's model class for a model and tokenizer in memory.

    Attributes:
        progress: called after each batch with (texts scored, texts in total).
        done: number of texts of the current task that were scored.
        total: number of texts of the current task.
        cut: number of texts longer than the context, whose beginning lm_eval cut off.
    """

    def __init__(self, model: AntransformerForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        with silenced():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_length=model.config.context,
                prefix_token_id=tokenizer.eos_token_id,
            )
        model.config.use_cache = False  # scoring takes one forward pass per text
        self.progress: Progress = lambda done, total: None
        self.done = self.total = self.cut = 0

    def score(self, tasks: Tasks, limit: int | None, progress: Progress) -> dict[str, Any]:
        """Return lm_eval's results for loaded tasks.

        Raises:
            DataError: an answer is longer than the context.
            CheckpointError: the logits are not finite.
            OverflowError: a perplexity overflows.
        """
        self.progress, self.done, self.total, self.cut = progress, 0, 0, 0
        with silenced():
            results: dict[str, Any] = evaluate(self, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of full texts, which are scored in consecutive windows."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self.total += sum(math.ceil(length / self.max_length) for length in lengths)
        values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return values

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *arguments: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        for _, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(f"an answer has {len(continuation)} tokens: the model accepts 1 to {self.max_length}")
        rolling = "override_bs" in options
        # With its logits cache, lm_eval reads texts that differ only in their last token once. The cache is wrong for
        # rolling windows: windows of a repetitive text can have equal tokens but score different numbers of them.
        self.logits_cache = not rolling
        if not rolling:
            texts = {(*context, *continuation[:-1]) for _, context, continuation in requests}
            self.total += len(texts)
            self.cut += sum(len(text) > self.max_length for text in texts)
        values: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return values

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *arguments, **options)
        if not logits.isfinite().all():
            raise CheckpointError("logits are not finite: the weights contain NaN or Inf, or training diverged")
        self.done += len(inps)
        self.progress(self.done, self.total)
        return logits


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress output, log lines and progress bars of lm_eval and of its dependencies."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@cache
def task_manager(all_tasks: bool) -> TaskManager:
    """Return lm_eval's index of the tasks in ``FOLDERS``, or of all tasks, which takes seconds to read."""
    folder = Path(lm_eval.tasks.__path__[0])
    with silenced():
        if all_tasks:
            return TaskManager()
        return TaskManager(include_defaults=False, include_path=[folder / name for name in FOLDERS])


def hub_tasks(name: str) -> Tasks:
    """Load a task, group or tag of lm_eval with its data from the hub.

    Raises:
        ConfigError: the task is unknown, or scores generated text.
        DataError: its data cannot be loaded.
    """
    # The index of all tasks is slow to read, so it is used only for names that are not in the small one.
    index = task_manager(name not in task_manager(False).task_index)
    if name not in index.task_index:
        known = f"known: {local_sets()}, and {len(index.all_tasks):,} more in lm_eval"
        raise ConfigError(f"unknown task {name}{nearest(name, index.all_tasks)} ({known})")
    try:
        with silenced():
            tasks: Tasks = index.load([name])
    except Exception as error:  # errors of the hub's client, the network and a data set's code share no base class
        reason = " ".join(str(error).split())
        advice = ": download its files and give --task-data DIR" if name in local_names() else ""
        raise DataError(f"{name}: its data cannot be loaded from the hub ({reason}){advice}") from error
    return with_defaults(tasks)


def local_tasks(name: str, folder: Path) -> tuple[Tasks, Path]:
    """Load a task of lm_eval with rows of a local file; return it with the file, or for a group with the folder.

    Raises:
        ConfigError: the task has no local form.
        DataError: its file is missing or broken.
    """
    index = task_manager(False).task_index
    if name not in local_names():
        raise ConfigError(f"unknown task {name}{nearest(name, local_names())} (known with --task-data: {local_sets()})")
    if name != task_data.BLIMP:
        path = task_data.find_file(name, folder)
        return with_defaults(with_rows({name: task_data.rows(name, path)})), path
    rows = {task: task_data.rows(task, task_data.find_file(task, folder)) for task in index[name].cfg["task"]}
    group = Group.from_config(index[name].cfg)
    for task in with_rows(rows)["tasks"].values():
        group.add(task)
    return with_defaults(task_manager(False).load([group])), folder


def local_names() -> list[str]:
    """Return the names of all tasks with a local form, each task of BLiMP included."""
    names = task_manager(False).all_tasks
    return [name for name in names if name in task_data.SETS or name.partition("_")[0] == task_data.BLIMP]


def local_sets() -> str:
    """Return the names of the local evaluation sets for messages, without the tasks of BLiMP."""
    return ", ".join([*task_data.SETS, task_data.BLIMP])


def with_rows(rows: dict[str, list[task_data.Row]]) -> Tasks:
    """Load lm_eval's tasks with these rows, by task, as their only data."""
    members = []
    for name, task_rows in rows.items():
        member = {"task": name, "custom_dataset": loader(task_rows), "training_split": None, "validation_split": None}
        if "query" in task_rows[0]:  # cleaned rows already have the form that process_docs produces
            member["process_docs"] = None
        members.append({**member, "test_split": "local"})
    with silenced():
        tasks: Tasks = task_manager(False).load([{"group": "local", "task": members}])
    return {"tasks": tasks["tasks"]}


def loader(rows: list[task_data.Row]) -> Callable[..., dict[str, Dataset]]:
    """Return a function that gives lm_eval these rows from memory, without a cache on disk."""
    return lambda **_: {"local": Dataset.from_list(rows)}


def with_defaults(tasks: Tasks) -> Tasks:
    """Set zero few-shot examples where a task has no number, and lm_eval's default seed.

    Raises:
        ConfigError: a task scores generated text.
    """
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            raise ConfigError(f"task {name} scores generated text: only tasks that score given text are supported")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    return tasks
