"""Evaluation of checkpoints: tasks of lm_eval, and perplexity on text files."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Tokenizer
from antransformer.errors import DataError, UsageError
from antransformer.extras import require
from antransformer.interop.export import transformers_model, transformers_tokenizer
from antransformer.training.checkpointing.checkpoint import Checkpoint

BATCH_SIZE = 16


@dataclass(frozen=True)
class Score:
    """Value of one metric on one task.

    Attributes:
        task: name of the task in lm_eval, or path of the text file.
        metric: name of the metric in lm_eval.
        value: value, or None if it is not finite.
        stderr: standard error, or None if lm_eval does not estimate it.
        items: number of scored items.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    items: int


@dataclass(frozen=True)
class Result:
    """Scores of one requested task, group of tasks or text file.

    Attributes:
        name: name of the task or group, or path of the text file.
        source: path of the data, or "hub".
        scores: scores; a group's scores come before the scores of its tasks.
        texts: number of texts that the model has read.
        cut: number of these texts that were longer than the context, so that their beginning was cut off.
        problem: reason why there are no scores, or None.
    """

    name: str
    source: str
    scores: list[Score]
    texts: int
    cut: int
    problem: str | None = None

    def summary(self) -> list[Score]:
        """Return the scores of the group itself if there are any, and otherwise all scores."""
        return [score for score in self.scores if score.task == self.name] or self.scores

    def line(self) -> str:
        """Return the summary in one line."""
        return ", ".join(f"{score.metric} {format_score(score.value)}" for score in self.summary())


def evaluate(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    task_data: Path | None = None,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    device: torch.device | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    scored: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Evaluate a checkpoint with lm_eval and return one result for each task.

    Args:
        checkpoint: verified checkpoint.
        tokenizer: tokenizer of its run.
        tasks: names of tasks in lm_eval.
        task_data: folder with the published files of the tasks; None downloads them from the Hugging Face hub.
        batch_size: number of texts in a batch.
        limit: maximum number of items per task.
        device: device of the model, by default the CPU.
        progress: called with (name, texts scored, texts in total), and with zeros before a task is loaded.
        scored: called with the result of each task that has scores.

    Raises:
        MissingExtraError: lm_eval is not installed.
        UsageError: lm_eval or transformers is too old.
        ConfigError: a task is unknown.
        DataError: a file is missing or broken, or the hub's data cannot be loaded.
        CheckpointError: the model is an ablation, or its weights are broken.
    """
    for module in ("lm_eval", "datasets", "transformers"):
        require(module, "eval")
    try:
        from antransformer.interop import lm_eval_adapter
    except ImportError as error:
        hint = "pip install --upgrade 'antransformer[eval]'"
        raise UsageError(f"this version of lm_eval or transformers does not work ({error}): {hint}") from error

    def load() -> Iterator[tuple[str, str, Any]]:
        for name in dict.fromkeys(tasks):
            progress(name, 0, 0)
            if task_data is None:
                yield name, "hub", lm_eval_adapter.hub_tasks(name)
            else:
                loaded, path = lm_eval_adapter.local_tasks(name, task_data)
                yield name, str(path), loaded

    queue = list(load())  # load everything first: a missing file must not surface after hours of scoring
    # transformers wraps .to without types
    model = transformers_model(checkpoint, tokenizer).to(device or torch.device("cpu"))  # type: ignore[arg-type]
    scorer = lm_eval_adapter.Scorer(model, transformers_tokenizer(tokenizer, checkpoint.model.context), batch_size)
    results = []
    for name, source, loaded in queue:
        try:
            scores = list(parse_scores(scorer.score(loaded, limit, partial(progress, name))))
            results.append(Result(name, source, scores, scorer.total, scorer.cut))
            scored(results[-1])
        except (DataError, OverflowError) as error:  # the other tasks can still be scored
            reason = str(error) if isinstance(error, DataError) else "its perplexity overflows"
            results.append(Result(name, source, [], scorer.total, scorer.cut, problem=reason))
    if all(result.problem for result in results):
        raise DataError("; ".join(f"{result.name} cannot be scored: {result.problem}" for result in results))
    return results


def parse_scores(results: dict[str, Any]) -> Iterator[Score]:
    """Yield lm_eval's results, groups first; its keys are ``metric,filter`` and ``metric_stderr,filter``."""
    groups = results["group_subtasks"]
    for task in sorted(results["results"], key=lambda name: name not in groups):
        values = results["results"][task]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                yield Score(task, metric, finite(value), finite(error), values["sample_len"])


def format_score(value: float | None) -> str:
    """Return four decimals of a small number, or four significant digits of a large one."""
    if value is None:
        return "infinite"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"


def finite(value: object) -> float | None:
    """Return a finite number as a float, and None for everything that JSON cannot represent as a number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
