"""Scores of a checkpoint: lm_eval's tasks, and perplexity on any text."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Tokenizer
from antransformer.errors import ConfigError, DataError, MissingExtraError
from antransformer.interop.export import transformers_model, transformers_tokenizer
from antransformer.training.checkpointing.checkpoint import Checkpoint

BATCH_SIZE = 16


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        task: of lm_eval, or the text file.
        metric: as lm_eval names it.
        value: None where it is not finite.
        stderr: None where lm_eval knows no standard error.
        items: scored.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    items: int


@dataclass(frozen=True)
class Result:
    """What was asked for, and its figures.

    Attributes:
        name: a task, a group of tasks, or a text file.
        source: the file of its items, or the hub.
        scores: of a group its own, and then those of its parts.
        texts: that the model has read.
        cut: those of them longer than the context, without their beginning.
        problem: why there are no figures; None as a rule.
    """

    name: str
    source: str
    scores: list[Score]
    texts: int
    cut: int
    problem: str | None = None

    def summary(self) -> list[Score]:
        """The figures of what was asked for: of a group those of the whole."""
        return [score for score in self.scores if score.task == self.name] or self.scores


def evaluate(
    found: Checkpoint,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    texts: Sequence[Path] = (),
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Result]:
    """Score a checkpoint with lm_eval's own code.

    Args:
        found: verified checkpoint.
        tokenizer: that of its run.
        tasks: by lm_eval's names.
        task_data: folder with the tasks' files, in the form in which they are published; None asks the hub.
        texts: files of UTF-8.
        batch_size: texts at a time.
        limit: most items of each task, and documents of each file.
        device: default the CPU.
        tell: called with name, texts scored and all texts of a task; with zeros before it is loaded.

    Raises:
        MissingExtraError: lm_eval is not installed.
        ConfigError: a task is unknown, or nothing is asked for.
        DataError: data could not be loaded, or a file is missing or broken.
        CheckpointError: the model is an ablation, or its weights are broken.
    """
    if not tasks and not texts:
        raise ConfigError("nothing to evaluate: give --tasks, or --text")
    try:
        from antransformer.interop import lm_eval_adapter as scorer
    except ImportError as error:
        raise MissingExtraError((error.name or "lm_eval").partition(".")[0], "eval") from error

    def load() -> Iterator[tuple[str, str, Any]]:
        for path in texts:
            yield str(path), str(path), scorer.text_tasks(path)
        for name in dict.fromkeys(tasks):
            tell(name, 0, 0)
            if task_data is None:
                yield name, "hub", scorer.hub_tasks(name)
            else:
                loaded, path = scorer.local_tasks(name, task_data)
                yield name, str(path), loaded

    work = list(load())  # all of it, before the first is scored
    model = transformers_model(found, tokenizer).to(device or torch.device("cpu"))  # type: ignore[arg-type]  # their wrapper's fault
    lm = scorer.Scorer(model, transformers_tokenizer(tokenizer, found.model.context), batch_size)
    results = []
    for name, source, loaded in work:
        try:
            scored = lm.score(loaded, limit, partial(tell, name))
            results.append(Result(name, source, list(scores_of(scored)), lm.total, lm.cut))
        except (DataError, OverflowError) as error:  # the others are no worse for it
            reason = str(error) if isinstance(error, DataError) else "its perplexity is beyond all numbers"
            results.append(Result(name, source, [], lm.total, lm.cut, problem=reason))
    if all(result.problem for result in results):
        raise DataError("; ".join(f"{result.name} can not be scored: {result.problem}" for result in results))
    return results


def scores_of(results: dict[str, Any]) -> Iterator[Score]:
    """lm_eval's results, groups first: its keys are ``metric,filter`` and ``metric_stderr,filter``."""
    groups = results["group_subtasks"]
    for task in sorted(results["results"], key=lambda name: name not in groups):
        values = results["results"][task]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                yield Score(task, metric, finite(value), finite(error), values["sample_len"])


def finite(value: object) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
