"""Our model as lm_eval sees it, and lm_eval's tasks, from its hub or from local files. Needs lm_eval."""

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
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.interop import local_tasks as task_data
from antransformer.interop.modeling_antransformer import AntransformerForCausalLM
from antransformer.training.config import nearest

# lm_eval would start a pool of processes for the error of a perplexity, which costs more than that error.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

FOLDERS = ("arc", "blimp", "hellaswag", "lambada", "piqa", "wikitext", "winogrande")
TEXT_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
BOOTSTRAP = 1000  # resamples for the error of a perplexity
SEED = 1234  # lm_eval's, of the choice of examples
LOGGERS = ("lm_eval", "huggingface_hub", "datasets", "transformers")

Tasks = dict[str, Any]
Tell = Callable[[int, int], None]


class Scorer(HFLM):
    """lm_eval's model class on a model and tokenizer in memory.

    Attributes:
        tell: called with the texts scored, and with all of them, after each batch of a task.
        done, total: those numbers.
        cut: texts longer than the context, of which lm_eval left out the beginning.
    """

    def __init__(self, model: AntransformerForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_length=model.config.context,
                prefix_token_id=tokenizer.eos_token_id,
            )
        model.config.use_cache = False
        self.tell: Tell = lambda done, total: None
        self.done = self.total = self.cut = 0

    def score(self, tasks: Tasks, limit: int | None, tell: Tell) -> dict[str, Any]:
        """Results of loaded tasks, as lm_eval has them.

        Raises:
            DataError: an answer does not fit into the context.
            CheckpointError: the weights are broken.
            OverflowError: a perplexity is no number.
        """
        self.tell, self.done, self.total, self.cut = tell, 0, 0, 0
        with quiet():
            results: dict[str, Any] = evaluate(self, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that follow each other."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self.total = sum(math.ceil(length / self.max_length) for length in lengths)
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *arguments: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(f"an answer has {len(continuation)} tokens: the model takes 1 to {self.max_length}")
            self.cut += len(context) + len(continuation) > self.max_length + 1
        windows = "override_bs" in options
        # Texts that differ in their last token only are read once. Not so the windows of repetitive text: lm_eval
        # would take those of the same tokens for the same, although they may score more or fewer of them.
        self.logits_cache = not windows
        if not windows:
            self.total = len({(*context, *continuation[:-1]) for _, context, continuation in requests})
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return found

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *arguments, **options)
        if not logits.isfinite().all():
            raise CheckpointError("the model's logits are not finite: its weights are not those of a sound run")
        self.done += len(inps)
        self.tell(self.done, self.total)
        return logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what lm_eval, and what it uses, print, log and draw."""
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
def manager(everything: bool) -> TaskManager:
    """lm_eval's index of tasks: of the sets that we know, or of all, which takes seconds to read."""
    folder = Path(lm_eval.tasks.__path__[0])
    with quiet():
        if everything:
            return TaskManager()
        return TaskManager(include_defaults=False, include_path=[folder / name for name in FOLDERS])


def hub_tasks(name: str) -> Tasks:
    """A task, group or tag of lm_eval with its data from the hub.

    Raises:
        ConfigError: there is no such task, or it has the model write text.
        DataError: its data could not be loaded.
    """
    index = manager(name not in manager(False).task_index)
    if name not in index.task_index:
        among = f"known: {sets()}, and {len(index.all_tasks):,} more of lm_eval"
        raise ConfigError(f"unknown task {name}{nearest(name, index.all_tasks)} ({among})")
    try:
        with quiet():
            tasks: Tasks = index.load([name])
    except Exception as error:  # of the hub's client, the network, a set's own code: they have no type in common
        reason = " ".join(str(error).split())
        local = ": give it as a file, --task-data DIR" if name in local_names() else ""
        raise DataError(f"{name}: its data can not be loaded from the hub ({reason}){local}") from error
    return prepared(tasks)


def local_tasks(name: str, folder: Path) -> tuple[Tasks, Path]:
    """A task of lm_eval with its rows from a local file, and that file, or the folder where they are many.

    Raises:
        ConfigError: there is no local form of such a task.
        DataError: its file is not there, or broken.
    """
    index = manager(False).task_index
    if name not in local_names():
        raise ConfigError(f"unknown task {name}{nearest(name, local_names())} (known with --task-data: {sets()})")
    if name != task_data.BLIMP:
        path = task_data.find(name, folder)
        return prepared(with_rows({name: task_data.rows(name, path)})), path
    rows = {part: task_data.rows(part, task_data.find(part, folder)) for part in index[name].cfg["task"]}
    group = Group.from_config(index[name].cfg)
    for task in with_rows(rows)["tasks"].values():
        group.add(task)
    return prepared(manager(False).load([group])), folder


def local_names() -> list[str]:
    """Tasks that have a local form, with the parts of BLiMP."""
    names = manager(False).all_tasks
    return [name for name in names if name in task_data.SETS or name.partition("_")[0] == task_data.BLIMP]


def sets() -> str:
    """The same in words, without those parts."""
    return ", ".join([*task_data.SETS, task_data.BLIMP])


def with_rows(rows: dict[str, list[task_data.Row]]) -> Tasks:
    """lm_eval's tasks as they are, but for where their rows come from."""
    members = []
    for name, found in rows.items():
        member = {"task": name, "custom_dataset": loader(found), "training_split": None, "validation_split": None}
        if "query" in found[0]:  # what process_docs would make
            member["process_docs"] = None
        members.append({**member, "test_split": "local"})
    with quiet():
        tasks: Tasks = manager(False).load([{"group": "local", "task": members}])
    return {"tasks": tasks["tasks"]}


def text_tasks(path: Path) -> Tasks:
    """The documents of a text file, scored as lm_eval's wikitext is; raises DataError."""
    aggregations = {"word_perplexity": perplexity, "byte_perplexity": perplexity, "bits_per_byte": "bits_per_byte"}
    metrics = [{"metric": name, "aggregation": aggregations[name], "higher_is_better": False} for name in TEXT_METRICS]
    config = {
        "task": str(path),
        "custom_dataset": loader(task_data.documents(path)),
        "test_split": "local",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": metrics,
    }
    with quiet():
        return prepared(manager(False).load([ConfigurableTask(config=config)]))


def perplexity(items: list[tuple[float, float]]) -> float:
    """lm_eval's, but infinite where it would overflow: text without spaces is one long word."""
    try:
        return float(weighted_perplexity(items))
    except OverflowError:
        return math.inf


def loader(rows: list[task_data.Row]) -> Callable[..., dict[str, Dataset]]:
    """What lm_eval calls for the data of a task; it lies in memory, and no cache is written."""
    return lambda **_: {"local": Dataset.from_list(rows)}


def prepared(tasks: Tasks) -> Tasks:
    """With no examples in the prompt where a task does not say how many, and lm_eval's own seed for their choice."""
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            raise ConfigError(f"task {name} has the model write text: only tasks that score given text can be run")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    return tasks
