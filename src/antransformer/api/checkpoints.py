"""Use a trained model: load, generate, export, serve and evaluate."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from antransformer.api.arguments import checked
from antransformer.comparison.summary import summary
from antransformer.data import Tokenizer
from antransformer.data.readers import TEXT_FIELD
from antransformer.errors import ConfigError
from antransformer.files import check_json_target, is_stream, write_result
from antransformer.inference.folding import folded_where_possible
from antransformer.inference.perplexity import perplexity
from antransformer.inference.text import continue_text
from antransformer.interop import evaluate as lm_eval
from antransformer.interop import serving
from antransformer.interop.export import export as export_checkpoint
from antransformer.interop.local_tasks import documents
from antransformer.interop.model_card import EVALUATION_FILE
from antransformer.interop.verification import Verification
from antransformer.models import Decoder
from antransformer.progress import EvaluationProgress
from antransformer.reporting.html import FILE as REPORT_FILE
from antransformer.results import comparison
from antransformer.training.checkpointing.checkpoint import Checkpoint, restore
from antransformer.training.device import choose_device
from antransformer.training.run_folder import open_checkpoint, run_folder_of

LOG = logging.getLogger(__name__)
REPORT_FIGURES = ("loss-tokens.png", "speedup-tokens.png")  # for the card of a run that belongs to a comparison


@checked
def load(path: str | Path, device: str = "auto") -> tuple[Decoder, Tokenizer]:
    """Return a trained model, in evaluation mode, and its tokenizer.

    Args:
        path: run folder, whose latest checkpoint is loaded, or one checkpoint.
        device: device of the model: auto, cpu, cuda or mps.

    Raises:
        CheckpointError, DataError: there is no usable checkpoint or tokenizer.
        ConfigError: the device is not available.
    """
    checkpoint, tokenizer = open_checkpoint(Path(path), LOG.warning)
    return restore(checkpoint, choose_device(device)), tokenizer


@checked
def generate(
    checkpoint: str | Path | tuple[Decoder, Tokenizer],
    prompt: str = "",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
    on_text: Callable[[str], object] = lambda piece: None,
) -> str:
    """Return a prompt and its continuation.

    Args:
        checkpoint: run folder, checkpoint, or what ``load`` returned.
        prompt: text to continue; empty starts a new document.
        max_new_tokens: upper limit of the continuation.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from the K most likely tokens.
        top_p: sample from the most likely tokens with this total probability.
        seed: seed of the sampling.
        device: device of a model that is loaded here.
        on_text: called with the prompt, then with each piece of text as it is generated.

    Raises:
        ConfigError: an option is out of range, or the device is not available.
        CheckpointError, DataError: as in ``load``.
        TypeError: the checkpoint is neither a path nor a model and its tokenizer.
    """
    pair = checkpoint if isinstance(checkpoint, tuple) else load(checkpoint, device)
    if len(pair) != 2 or not isinstance(pair[0], Decoder) or not isinstance(pair[1], Tokenizer):
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise TypeError(f"generate takes a path, or the model and tokenizer that load returned, got ({kinds})")
    model, tokenizer = pair
    pieces = continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    text = [prompt]
    on_text(prompt)
    for piece in pieces:
        text.append(piece)
        on_text(piece)
    return "".join(text)


@checked
def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str = "native",
    dtype: str | None = None,
    max_shard_size: str | None = None,
    on_check: Callable[[Verification], object] = lambda verification: None,
) -> Checkpoint:
    """Export a run or a checkpoint to a new Hugging Face folder or GGUF file; returns the checkpoint exported.

    Args:
        checkpoint: run folder, or one checkpoint.
        out: folder or GGUF file to create.
        format: ``native`` is a folder with the code of this package, which fine-tuning needs. ``exaone4`` (anGPT) and
            ``qwen3`` (GPT+) are folders of a standard architecture, ``gguf`` a file of it for llama.cpp.
        dtype: data type of the weights: float32 (default), bfloat16 or float16; with ``gguf`` f32 (default), f16, bf16,
            q8_0 or q4_0.
        max_shard_size: size limit of one file of weights, such as 200MB (default 5GB); not with ``gguf``.
        on_check: called with the comparison of the written files with the checkpoint.

    Raises:
        CheckpointError, ConfigError, MachineError, MissingExtraError: as in ``interop.export.export``.
    """
    source, tokenizer = open_checkpoint(Path(checkpoint), LOG.warning)
    experiment = run_folder_of(source).parent.parent  # if the run is one of a comparison
    reported = all((experiment / name).is_file() for name in (REPORT_FILE, comparison.FILE))
    text = summary(comparison.Results.load(experiment)) if reported else None
    figures = [experiment / name for name in REPORT_FIGURES if reported and (experiment / name).is_file()]
    verification = export_checkpoint(source, tokenizer, Path(out), dtype, max_shard_size, text, figures, format)
    on_check(verification)
    return source


@checked
@contextlib.contextmanager
def serve(
    checkpoint: str | Path | None = None, *, gguf: str | Path | None = None, port: int = 8080, dtype: str | None = None
) -> Iterator[serving.Server]:
    """Serve a model with an OpenAI-compatible interface on this machine, while the context is open.

    Yields its address, a string, whose method ``wait`` blocks while the server runs.

    Args:
        checkpoint: run folder, or one checkpoint; it is exported to a temporary GGUF file.
        gguf: GGUF file to serve in place of a checkpoint.
        port: port on 127.0.0.1; 0 chooses a free one.
        dtype: data type of the weights of the temporary file, as in ``export`` (default f32).

    Raises:
        ConfigError: both or neither of checkpoint and file are given, a data type is given for a file, or the port is
            in use.
        CheckpointError, MachineError, MissingExtraError: as in ``export``.
    """
    if gguf and dtype:
        raise ConfigError(f"dtype {dtype} belongs to a checkpoint: the weights in {gguf} have a data type already")
    if gguf and not checkpoint:
        server = serving.serve_file(Path(gguf), port)
    elif checkpoint and not gguf:
        source, tokenizer = open_checkpoint(Path(checkpoint), LOG.warning)
        server = serving.serve_checkpoint(source, tokenizer, dtype or "f32", port)
    else:
        raise ConfigError("give one of the two: checkpoint or gguf")
    with server as address:
        yield address


@dataclass(frozen=True)
class Evaluation:
    """Scores of a checkpoint.

    Attributes:
        checkpoint: the checkpoint evaluated.
        results: scores of each task and text file, or the reason why it has none.
        path: JSON file with all of them.
    """

    checkpoint: Checkpoint
    results: tuple[lm_eval.Result, ...]
    path: Path

    @property
    def scores(self) -> list[lm_eval.Score]:
        """One score for each task and metric; of a group of tasks, the score of the group."""
        return [score for result in self.results for score in result.summary()]


@checked
def evaluate(
    checkpoint: str | Path,
    *,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    texts: Sequence[str | Path] = (),
    text_field: str = TEXT_FIELD,
    batch_size: int = lm_eval.BATCH_SIZE,
    limit: int | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score a run or a checkpoint with lm_eval, or by its perplexity on text files.

    Args:
        checkpoint: run folder, or one checkpoint.
        tasks: names of lm_eval tasks.
        task_data: folder with the files of the tasks; None downloads them from the Hugging Face hub.
        texts: files of UTF-8 text, JSON lines or parquet, as ``prepare`` reads them.
        text_field: field of JSON lines or column of parquet that holds the text.
        batch_size: texts per forward pass; fewer where a text file is scored on a CPU, which is faster.
        limit: maximum number of items per task, and of documents per file.
        device: device of the model.
        out: JSON file of the scores; by default ``evaluation.json`` in the run folder, which ``export`` reads. Until
            all are done, those of finished tasks and files are in ``evaluation.unfinished.json``.
        progress: whether to show progress.

    Raises:
        ConfigError: there are neither tasks nor texts, or a number is below 1.
        CheckpointError, DataError: the checkpoint or a text file cannot be used.
        ConfigError, DataError, MissingExtraError: with tasks, as in ``interop.evaluate.evaluate``.
    """
    source, tokenizer = open_checkpoint(Path(checkpoint), LOG.warning)
    path = Path(out) if out else run_folder_of(source) / EVALUATION_FILE
    check_json_target("--out", path, lambda content: "results" in content)
    if not tasks and not texts:
        raise ConfigError("nothing to evaluate: give tasks or texts (--tasks, --text)")
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
    if task_data is not None and not tasks:
        raise ConfigError(f"task_data {task_data} belongs to tasks, and none is given: omit it, or name the tasks")
    # All files are read before anything is scored: a missing one must not surface after hours.
    read = {str(name): [row["text"] for row in documents(Path(name), text_field, limit)] for name in texts}
    torch_device, results = choose_device(device), []
    settings = {"checkpoint": str(source.path), "step": source.step, "batch_size": batch_size, "limit": limit}
    unfinished, finished = path.with_suffix(f".unfinished{path.suffix}"), []

    def scored(result: lm_eval.Result) -> None:
        finished.append(result)
        if not is_stream(path):
            _write_scores(unfinished, settings, finished)
        display.scored(result.name, result.line())

    with EvaluationProgress(enabled=progress) as display:
        if tasks:
            folder = None if task_data is None else Path(task_data)
            results = lm_eval.evaluate(
                source, tokenizer, tasks, folder, batch_size, limit, torch_device, display, scored
            )
        if read:
            model = folded_where_possible(restore(source, torch_device))
            texts_scored = []
            for name, text in read.items():
                texts_scored.append(_score_text(model, tokenizer, name, text, batch_size, display))
                scored(texts_scored[-1])
            results = [*texts_scored, *results]
    _write_scores(path, settings, results)
    if not is_stream(path):
        unfinished.unlink(missing_ok=True)
    return Evaluation(source, tuple(results), path)


def _write_scores(path: Path, settings: Mapping[str, Any], results: Sequence[lm_eval.Result]) -> None:
    content = {**settings, "results": [asdict(result) for result in results]}
    write_result(path, json.dumps(content, indent=2) + "\n")


def _score_text(
    model: Decoder,
    tokenizer: Tokenizer,
    name: str,
    texts: Sequence[str],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> lm_eval.Result:
    """Score the documents of one text file."""
    scored = perplexity(model, tokenizer, texts, batch_size, partial(progress, name))
    scores = [
        lm_eval.Score(name, metric, lm_eval.finite(value), None, scored.documents)
        for metric, value in scored.metrics().items()
    ]
    return lm_eval.Result(name, name, scores, scored.windows, cut=0)
