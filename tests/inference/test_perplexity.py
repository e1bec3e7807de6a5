"""Perplexity on plain text: against single windows of the unfolded model, and against lm_eval."""

import gzip
import json
import math
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import antransformer
from antransformer.api import checkpoints
from antransformer.cli import main
from antransformer.data import readers
from antransformer.errors import CheckpointError, DataError
from antransformer.inference import perplexity as scoring
from antransformer.inference.perplexity import perplexity, rolling_windows
from helpers.commands import refused
from helpers.exported import make_run
from helpers.messages import mentions

END, CONTEXT = 256, 48
# Longer than a window, shorter, exactly one window, of one token, and one long word of equal windows.
DOCUMENTS = ["to be, or  not\nto be. " * 9, "ä short one", "x" * CONTEXT, "y", "abcd" * 30]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity") / "run"
    make_run(folder, vocab_size=300)  # more ids than the tokenizer
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("<|endoftext|>".join([*DOCUMENTS, "\n"]), encoding="utf-8")
    return path


@torch.no_grad()
def loss_of_single_windows(model):
    """Loss of all documents, one window of the unfolded model at a time, and the number of windows."""
    total, windows = 0.0, 0
    for text in DOCUMENTS:
        ids = [END, *text.encode()]
        for start in range(1, len(ids), CONTEXT):
            end = min(start + CONTEXT, len(ids))
            window = torch.tensor([ids[max(0, end - CONTEXT - 1) : end]])
            scores = model(window[:, :-1]).double().log_softmax(-1).gather(2, window[:, 1:, None])
            total, windows = total - scores[0, start - end :].sum().item(), windows + 1
    return total, windows


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("cpu_tokens", [1, 10_000])
def test_the_loss_is_that_of_single_windows(run, monkeypatch, batch_size, cpu_tokens):
    monkeypatch.setattr(scoring, "CPU_TOKENS", cpu_tokens)
    model, tokenizer = antransformer.load(run, device="cpu")
    calls, threads = [], torch.get_num_threads()
    scored = perplexity(model, tokenizer, DOCUMENTS, batch_size, lambda *call: calls.append(call))
    expected, windows = loss_of_single_windows(model)
    assert scored.loss == pytest.approx(expected, rel=1e-5)
    assert scored.windows == windows and calls[-1] == (windows, windows) and calls == sorted(set(calls))
    assert torch.get_num_threads() == threads


def test_windows_score_each_token_once_and_have_the_full_context():
    for length in range(1, 30):
        ids = np.arange(1, length + 1, dtype=np.uint32)
        windows = list(rolling_windows(ids, 0, 7))
        assert [token for window in windows for token in window.ids[-window.scored :]] == list(range(1, length + 1))
        assert all(len(window.ids) == min(length, 7) + 1 for window in windows)
        assert all(np.array_equal(np.diff(window.ids), np.ones(len(window.ids) - 1)) for window in windows)


def test_figures_are_those_of_lm_eval(run, book, tmp_path):
    pytest.importorskip("lm_eval")
    from helpers.lm_eval_texts import score_text

    theirs = score_text(run, book)
    [ours] = antransformer.evaluate(run, texts=[book], device="cpu", out=tmp_path / "scores.json").results
    assert [score.metric for score in ours.scores] == [score.metric for score in theirs.scores]
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-4)
        assert (mine.task, mine.items, mine.stderr) == (other.task, other.items, other.stderr)
    assert (ours.name, ours.source, ours.texts, ours.cut) == (theirs.name, theirs.source, theirs.texts, theirs.cut)


@pytest.mark.parametrize("options", [{}, {"ablation": "no-lerp"}, {"architecture": "ngpt"}])
def test_text_is_scored_without_lm_eval(tmp_path, book, options):
    make_run(tmp_path / "run", **options)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('lm_eval', 'transformers', 'datasets')));"
        "from antransformer.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["evaluate", "--checkpoint", tmp_path / "run", "--device=cpu", "--text", book, "--limit=2"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "run/evaluation.json").read_text())["results"]
    values = {score["metric"]: score["value"] for score in result["scores"]}
    texts = DOCUMENTS[:2]
    size, words = sum(len(text.encode()) for text in texts), sum(len(re.split(r"\s+", text)) for text in texts)
    loss = values["bits_per_byte"] * size * math.log(2)
    assert values["byte_perplexity"] == pytest.approx(math.exp(loss / size))
    assert values["word_perplexity"] == pytest.approx(math.exp(loss / words))
    assert [score["items"] for score in result["scores"]] == [2, 2, 2]


def test_an_interrupted_evaluation_leaves_the_scores_of_finished_files(run, book, tmp_path, monkeypatch):
    other, out, unfinished = tmp_path / "other.txt", tmp_path / "scores.json", tmp_path / "scores.unfinished.json"
    other.write_text("to be or not to be")
    evaluate = partial(antransformer.evaluate, run, texts=[book, other], device="cpu", out=out)
    score = checkpoints.perplexity

    def interrupted(model, tokenizer, texts, *arguments):
        if texts == [other.read_text()]:
            raise KeyboardInterrupt
        return score(model, tokenizer, texts, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "perplexity", interrupted)
        evaluate()
    left = json.loads(unfinished.read_text())
    assert not out.exists() and [result["name"] for result in left["results"]] == [str(book)]
    evaluate()
    written = json.loads(out.read_text())
    assert not unfinished.exists() and written["results"][0] == left["results"][0] and len(written["results"]) == 2


def test_documents_are_read_as_by_prepare(run, book, tmp_path, capsys):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(book.read_bytes()))
    files = [book, *sorted(tmp_path.iterdir())]
    words = ["evaluate", "--checkpoint", run, "--device=cpu", "--out", tmp_path / "scores.json", "--text", *files]
    assert mentions(refused(words, capsys), "lines.jsonl", "body", "--text-field")
    assert main([*map(str, words), "--text-field=body"]) == 0
    results = json.loads((tmp_path / "scores.json").read_text())["results"]
    scores = [[(score["value"], score["items"]) for score in result["scores"]] for result in results]
    assert len(scores) == 4 and all(score == scores[0] for score in scores)
    captured = capsys.readouterr()
    assert "items" in captured.out and "error" not in captured.out  # a perplexity has no standard error
    assert str(results[0]["texts"]) not in captured.err.split()  # windows, which the table does not count


def test_a_limit_ends_the_reading(run, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken')
    options = {"texts": [tmp_path / "lines.jsonl"], "device": "cpu", "out": tmp_path / "scores.json"}
    assert antransformer.evaluate(run, limit=2, **options).scores[0].items == 2
    with pytest.raises(DataError):
        antransformer.evaluate(run, limit=3, **options)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "txt.gz"])
def test_a_long_document_is_scored_whole(run, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 100)  # where prepare cuts documents
    text = "to be, or not\n" * 50
    line = (text if ending.startswith("txt") else json.dumps({"text": text}) + "\n").encode()
    (tmp_path / f"long.{ending}").write_bytes(gzip.compress(line) if ending.endswith("gz") else line)
    [result] = antransformer.evaluate(run, texts=[tmp_path / f"long.{ending}"], out=tmp_path / "scores").results
    assert {score.items for score in result.scores} == {1}


def test_a_word_perplexity_that_overflows_has_no_value(run, tmp_path):
    (tmp_path / "word").write_text("abcdefgh" * 53)
    [result] = antransformer.evaluate(run, texts=[tmp_path / "word"], out=tmp_path / "scores").results
    values = {score.metric: score.value for score in result.scores}
    assert values["word_perplexity"] is None and math.isfinite(values["bits_per_byte"])


def test_broken_weights_raise(run):
    model, tokenizer = antransformer.load(run, device="cpu")
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(CheckpointError):
        perplexity(model, tokenizer, DOCUMENTS, 4)


def test_mistakes_leave_nothing_behind(run, book, tmp_path, capsys):
    words = ["evaluate", "--checkpoint", run, "--out", tmp_path / "scores.json"]
    for wrong in (
        ["--text", tmp_path / "missing"],
        ["--text", book, tmp_path],
        ["--text", book, "--task-data", tmp_path],
        ["--text", book, "--batch-size", "0"],
        ["--text", book, "--limit", "none"],
        ["--text", book, "--device", "tpu"],
    ):
        refused([*words, *wrong], capsys)
        assert not list(tmp_path.iterdir())
    assert main([*map(str, words), "--text", str(book)]) == 0
