"""Evaluation with lm_eval: scores against our own model, and local files against the hub's data."""

import errno
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from antransformer.cli import main
from antransformer.data import byte_tokenizer
from antransformer.errors import CheckpointError, DataError
from antransformer.interop.evaluate import evaluate
from antransformer.interop.export import transformers_model, transformers_tokenizer
from antransformer.interop.local_tasks import find_file, split_articles
from antransformer.training.checkpointing import checkpoint
from antransformer.training.run_folder import open_checkpoint
from helpers.exported import make_run

pytest.importorskip("lm_eval")
import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from antransformer.interop import lm_eval_adapter
from helpers.lm_eval_texts import score_text
from helpers.messages import mentions

END = 256
CONTEXT = 192
ENDINGS = ["is using wrap to wrap skis.", "is ripping level tiles off.", "sits  [still].", "starts pulling up roofing."]
HELLASWAG = [
    {"activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he", "label": 3},
    {"activity_label": "Home", "ctx_a": "[header] How to cook [title] Boil  water.", "ctx_b": "", "label": 2},
    {"activity_label": "Canoeing", "ctx_a": "Two women are shown in a canoe.", "ctx_b": "the women", "label": 0},
]
CLEANED = [
    {"query": "Roof shingle removal: A man is sitting on a roof. He", "gold": 3},
    {"query": "Home: How to cook. Boil water.", "gold": 2},
    {"query": "Canoeing: Two women are shown in a canoe. The women", "gold": 0},
]
QUESTIONS = [
    ("m1", "Which technology was developed most recently?", ["telephone", "television", "oven", "plane"], "ABCD", 1),
    ("m2", "What is an alga?", ["a plant", "a star", "a metal"], "123", 2),
    ("m3", "What do cows eat?", ["grass", "stones"], "AB", 0),
]
PIQA = [
    {"goal": "How do I open a can?", "sol1": "With an opener.", "sol2": "With a spoon and some luck.", "label": 0},
    {"goal": "dresser", "sol1": "replace drawer with bobby pin ", "sol2": "finish, woodgrain", "label": 1},
    {"goal": "To boil water,", "sol1": "cool it.", "sol2": "heat it.", "label": 1},
]
WINOGRANDE = [
    {"sentence": "Sarah was better than Maria so _ got it.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
    {"sentence": "The wine ruined the bed, the _ was wet.", "option1": "wine", "option2": "bed", "answer": "2"},
    {"sentence": "Ann paid Eve because _ was owed it.", "option1": "Ann", "option2": "Eve", "answer": "1"},
]
LAMBADA = [
    {"text": "In my palm is a stone, and I don't care about signs"},
    {"text": "At the docks she saw\n\nthe docks"},
]
BLIMP = [
    {
        "sentence_good": "Who have those men revealed they helped?",
        "sentence_bad": "Who have those men revealed who helped?",
    },
    {"sentence_good": "Carlos sees himself.", "sentence_bad": "Carlos sees itself."},
    {"sentence_good": "Some boy is here.", "sentence_bad": "Some boys is here."},
]
ARTICLES = [
    ' = A city = \n \n It has 1 @,@ 000 people , and a river ; it " floods " . \n \n = = Streets = = \n \n x = 5 ',
    " = B = \n \n Another , with <unk> . \n",
]
WIKITEXT = " \n" + "\n".join(ARTICLES)


def arc_release(name, question, choices, labels, gold):
    options = [{"text": choice, "label": label} for choice, label in zip(choices, labels, strict=True)]
    return {"id": name, "question": {"stem": question, "choices": options}, "answerKey": labels[gold]}


def arc_hub(name, question, choices, labels, gold):
    options = {"text": choices, "label": list(labels)}
    return {"id": name, "question": question, "choices": options, "answerKey": labels[gold]}


def arc_gold(name, question, choices, labels, gold):
    return {"id": name, "question": question, "choices": choices, "gold": gold}


ARC_HUB = [arc_hub(*question) for question in QUESTIONS]
HELLASWAG_HUB = [{**line, "endings": ENDINGS, "label": str(line["label"])} for line in HELLASWAG]
CLEAN_ENDINGS = [*ENDINGS[:2], "sits .", ENDINGS[3]]
# Task, its files on disk, and its rows on the hub.
FORMS = {
    "hellaswag": (
        "hellaswag",
        {"hellaswag_val.jsonl": [{"ind": 1, "split": "val", **line, "endings": ENDINGS} for line in HELLASWAG]},
        HELLASWAG_HUB,
    ),
    "hellaswag-cleaned": (
        "hellaswag",
        {"hellaswag/val.jsonl": [{**line, "choices": CLEAN_ENDINGS} for line in CLEANED]},
        HELLASWAG_HUB,
    ),
    "arc": ("arc_easy", {"ARC-Easy/ARC-Easy-Test.jsonl": [arc_release(*question) for question in QUESTIONS]}, ARC_HUB),
    "arc-hub": ("arc_challenge", {"arc_challenge_test.jsonl": ARC_HUB, "arc_challenge_train.jsonl": []}, ARC_HUB),
    "arc-gold": ("arc_easy", {"arc_easy_test.jsonl": [arc_gold(*question) for question in QUESTIONS]}, ARC_HUB),
    "piqa": (
        "piqa",
        {
            "piqa/valid.jsonl": [{name: line[name] for name in ("goal", "sol1", "sol2")} for line in PIQA],
            "piqa/valid-labels.lst": [line["label"] for line in PIQA],
            "piqa/train.jsonl": [],
        },
        PIQA,
    ),
    "piqa-hub": ("piqa", {"piqa_validation.jsonl": PIQA}, PIQA),
    "winogrande": (
        "winogrande",
        {
            "winogrande_1.1/dev.jsonl": [{"qID": "q", **line} for line in WINOGRANDE],
            "winogrande_1.1/train_xl.jsonl": [],
        },
        WINOGRANDE,
    ),
    "lambada": ("lambada_openai", {"lambada_test.jsonl": LAMBADA, "lambada_test_de.jsonl": []}, LAMBADA),
    "blimp": (
        "blimp_adjunct_island",
        {"blimp/data/adjunct_island.jsonl": [{"UID": "adjunct_island", **line} for line in BLIMP]},
        [{"UID": "adjunct_island", **line} for line in BLIMP],
    ),
    "wikitext": (
        "wikitext",
        {"wikitext-2-raw/wiki.test.raw": WIKITEXT},
        [{"page": page} for page in ARTICLES],
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run folder whose model has 300 ids, of which the tokenizer has 257."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, context=CONTEXT, vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def model(run):
    """Model of the run in our own implementation."""
    return checkpoint.restore(open_checkpoint(run)[0], torch.device("cpu"))


def scorer_of(run, batch_size):
    opened, tokenizer = open_checkpoint(run)
    return lm_eval_adapter.Scorer(
        transformers_model(opened, tokenizer), transformers_tokenizer(tokenizer, opened.model.context), batch_size
    )


@torch.no_grad()
def log_likelihood(model, ids, answer):
    """Log-likelihood of the last ``answer`` ids, given the earlier ids within the context."""
    window = torch.tensor([ids[-(model.config.context + 1) :]])
    logits = model(window[:, :-1]).double().log_softmax(-1)
    return logits.gather(2, window[:, 1:, None])[0, -answer:, 0].sum().item()


def write(folder, files):
    for name, lines in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("arc_easy", "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl"),
        ("hellaswag", "data/hellaswag_val.jsonl"),
        ("winogrande", "downloads/winogrande_1.1/dev.jsonl"),
        ("blimp_wh_island", "x/blimp/wh_island.jsonl"),
        ("wikitext", "wikitext-103-raw/wiki.test.raw"),
    ],
)
def test_files_are_found_up_to_two_folders_deep(tmp_path, task, path):
    write(tmp_path, {path: "", "a/b/c/hellaswag_val.jsonl": "", "other/notes.jsonl": ""})
    assert find_file(task, tmp_path) == tmp_path / path


def test_spellings_of_one_name_are_two_files(tmp_path):
    write(tmp_path, {"ARC-Easy-Test.jsonl": "", "arc_easy_test.jsonl": ""})
    with pytest.raises(DataError) as caught:
        find_file("arc_easy", tmp_path)
    assert mentions(str(caught.value), "ARC-Easy-Test.jsonl", "arc_easy_test.jsonl")


# The model


def pairs():
    texts = [("", "abc"), ("to be", " or not to be"), ("x" * 400 + "ab", " end"), ("a space behind ", "it")]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(texts)]


def test_the_likelihood_of_an_answer_is_that_of_our_own_model(run, model):
    scorer = scorer_of(run, batch_size=4)
    values = [value for value, _ in scorer.loglikelihood(pairs(), disable_tqdm=True)]
    expected = [
        log_likelihood(model, [END, *b"abc"], 3),
        log_likelihood(model, [*b"to be or not to be"], 13),
        log_likelihood(model, [*b"x" * 400, *b"ab end"], 4),
        log_likelihood(model, [*b"a space behind it"], 3),
    ]
    assert values == pytest.approx(expected, rel=1e-4)
    assert (scorer.cut, scorer.done, scorer.total) == (1, 4, 4)


def test_a_text_before_several_answers_of_one_token_is_counted_once(run):
    scorer, question = scorer_of(run, batch_size=4), "x" * 400
    requests = [Instance("loglikelihood", {}, (question, answer), number) for number, answer in enumerate("ABCD")]
    scorer.loglikelihood(requests, disable_tqdm=True)
    scorer.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (question,), 0)], disable_tqdm=True)
    windows = math.ceil(len(question) / CONTEXT)
    assert (scorer.cut, scorer.done, scorer.total) == (1, 1 + windows, 1 + windows)


def test_scores_do_not_depend_on_the_batch_size(run):
    single, batched = (scorer_of(run, size).loglikelihood(pairs(), disable_tqdm=True) for size in (1, 4))
    assert [value for value, _ in batched] == pytest.approx([value for value, _ in single], rel=1e-5)


def test_broken_weights_raise(run):
    scorer = scorer_of(run, batch_size=4)
    with torch.no_grad():
        scorer.model.lm_head.weight[7] = math.nan
    with pytest.raises(CheckpointError, match="logits"):
        scorer.loglikelihood(pairs(), disable_tqdm=True)


def test_a_perplexity_that_overflows_is_a_problem_of_its_task_only(run, tmp_path):
    folder = write(tmp_path, {"lambada_test.jsonl": [{"text": "a " + "b" * 170}]} | FORMS["piqa"][1])
    lambada, piqa = evaluate(*open_checkpoint(run), ["lambada_openai", "piqa"], folder)
    assert mentions(lambada.problem, "perplexity") and not lambada.scores
    assert piqa.problem is None and piqa.scores


@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_of_a_text_is_that_of_our_own_model(run, model, tmp_path, batch_size):
    texts = ["to be, or  not\nto be. " * 40, "ä short one", "x" * CONTEXT]
    (tmp_path / "text").write_text("<|endoftext|>".join([*texts, "\n"]), encoding="utf-8")
    result = score_text(run, tmp_path / "text", batch_size)
    total, windows = 0.0, 0
    for text in texts:
        ids = [END, *text.encode()]
        for start in range(1, len(ids), CONTEXT):
            end = min(start + CONTEXT, len(ids))
            total, windows = total + log_likelihood(model, ids[:end], end - start), windows + 1
    words, size = sum(len(re.split(r"\s+", text)) for text in texts), sum(len(text.encode()) for text in texts)
    assert {score.metric: score.value for score in result.scores} == pytest.approx(
        {
            "word_perplexity": math.exp(-total / words),
            "byte_perplexity": math.exp(-total / size),
            "bits_per_byte": -total / size / math.log(2),
        },
        rel=1e-4,
    )
    assert [score.items for score in result.scores] == [3, 3, 3] and result.texts == windows == 7


def test_equal_windows_are_all_scored(run, model, tmp_path):
    (tmp_path / "text").write_text("abcdefg " * 53)  # all windows have equal tokens
    calls = []
    result = score_text(run, tmp_path / "text", progress=lambda *call: calls.append(call))
    values = {score.metric: score.value for score in result.scores}
    ids = [END, *b"abcdefg " * 53]
    total = sum(
        log_likelihood(model, ids[: start + CONTEXT], min(CONTEXT, 425 - start)) for start in range(1, 425, CONTEXT)
    )
    assert values["bits_per_byte"] == pytest.approx(-total / 424 / math.log(2), rel=1e-5)
    assert calls[-1] == (3, 3)


# The tasks


@pytest.mark.parametrize("form", FORMS)
def test_a_task_has_equal_scores_from_a_file_and_from_the_hub(run, tmp_path, monkeypatch, form):
    task, files, rows = FORMS[form]
    scored = []

    def spy(self, requests, *arguments, **options):
        scored.append([(request[1], request[2]) for request in requests])
        return lm_eval_adapter.HFLM._loglikelihood_tokens(self, requests, *arguments, **options)

    monkeypatch.setattr(lm_eval_adapter.Scorer, "_loglikelihood_tokens", spy)
    scored_split = "test" if task.startswith(("arc", "lambada", "wiki")) else "validation"
    splits = {split: rows if split == scored_split else rows[:1] for split in ("validation", "test", "train")}
    if task.startswith("blimp"):
        splits = {"train": rows}
    hub = {split: datasets.Dataset.from_list(lines) for split, lines in splits.items()}
    [local] = evaluate(*open_checkpoint(run), [task], write(tmp_path, files), batch_size=4)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    [online] = evaluate(*open_checkpoint(run), [task], batch_size=4)
    half = len(scored) // 2
    assert scored[:half] == scored[half:] and sum(map(len, scored[:half])) >= len(rows)
    assert local.scores == online.scores and {score.items for score in local.scores} == {len(rows)}
    assert online.source == "hub" and local.source == str(tmp_path / next(iter(files)))


def test_accuracy_and_perplexity_are_those_of_our_own_model(run, model, tmp_path):
    folder = write(tmp_path, FORMS["lambada"][1] | FORMS["blimp"][1] | FORMS["winogrande"][1])
    tasks = ["lambada_openai", "blimp_adjunct_island", "winogrande"]
    results = evaluate(*open_checkpoint(run), tasks, folder)
    values = {(score.task, score.metric): score.value for result in results for score in result.scores}
    last = [(len(line["text"].rsplit(" ", 1)[1]) + 1, line["text"].encode()) for line in LAMBADA]
    mean = sum(log_likelihood(model, [*text], size) for size, text in last) / len(last)
    assert values["lambada_openai", "perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    good = [
        log_likelihood(model, [END, *line["sentence_good"].encode()], len(line["sentence_good"]))
        > log_likelihood(model, [END, *line["sentence_bad"].encode()], len(line["sentence_bad"]))
        for line in BLIMP
    ]
    assert values["blimp_adjunct_island", "acc"] == pytest.approx(sum(good) / len(good))
    correct = []
    for line in WINOGRANDE:
        rest = " " + line["sentence"].split("_")[1].strip()
        options = [line["sentence"].split("_")[0] + line[name] + rest for name in ("option1", "option2")]
        first, second = (log_likelihood(model, [*text.encode()], len(rest)) for text in options)
        correct.append((first > second) == (line["answer"] == "1"))
    assert values["winogrande", "acc"] == pytest.approx(sum(correct) / len(correct))


def test_blimp_is_the_mean_of_its_tasks(run, tmp_path):
    parts = lm_eval_adapter.task_manager(False).task_index["blimp"].cfg["task"]
    lines = {part.removeprefix("blimp_"): BLIMP[: 2 + number % 2] for number, part in enumerate(parts)}
    folder = write(tmp_path, {f"blimp/{name}.jsonl": part for name, part in lines.items()})
    [result] = evaluate(*open_checkpoint(run), ["blimp"], folder, limit=3, batch_size=64)
    [group], scores = result.summary(), [score for score in result.scores if score.task != "blimp"]
    assert len(scores) == 67 and group.value == pytest.approx(sum(score.value for score in scores) / 67)
    assert group.items == sum(map(len, lines.values())) and group.stderr > 0
    (folder / "blimp/wh_island.jsonl").unlink()
    with pytest.raises(DataError) as error:
        evaluate(*open_checkpoint(run), ["blimp"], folder)
    assert mentions(str(error.value), str(folder), "blimp_wh_island", "blimp*/wh_island.jsonl")


def test_articles_are_split_at_their_titles():
    assert split_articles(WIKITEXT) == ARTICLES
    assert split_articles(" = X = \n = = Y = = \n = = = Z = = = \n = 5 \n") == [
        " = X = \n = = Y = = \n = = = Z = = = \n = 5 \n"
    ]


# The command line


def test_evaluate_on_the_command_line(run, tmp_path):
    folder = write(tmp_path / "sets", FORMS["piqa"][1] | FORMS["winogrande"][1] | FORMS["hellaswag"][1])
    long = {"goal": "x" * 300, "sol1": "yes", "sol2": "no", "label": 0}
    write(folder, {"piqa/valid.jsonl": [*PIQA, long], "piqa/valid-labels.lst": [0, 1, 1, 0]})
    write(folder, {"hellaswag_val.jsonl": [{**HELLASWAG_HUB[0], "endings": ["a", "b" * 300, "c", "d"]}]})
    (tmp_path / "text").write_text("to be or not to be")
    home = tmp_path / "home"
    home.mkdir()
    words = [sys.executable, "-m", "antransformer", "evaluate", "--checkpoint", run, "--device=cpu", "--batch-size=2"]
    words += ["--tasks", "piqa,winogrande,hellaswag", "--task-data", folder, "--text", tmp_path / "text"]
    environment = {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    process = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert re.search(r"winogrande +acc +[01]\.\d{4} +± 0\.\d{4} +3 *\n", process.stdout), process.stdout
    assert re.search(r"text +word_perplexity +[\d,.e+]+ +1 *\n", process.stdout)
    lines = process.stdout.splitlines()
    assert [mentions(line, "piqa", "2", "8", "192") for line in lines].count(True) == 1  # texts longer than the context
    assert [mentions(line, "hellaswag", "301", "192") for line in lines].count(True) == 1
    # One line per task with its scores, which a later interruption does not lose, and no output of lm_eval.
    logged = re.findall(r"^\[0:\d\d:\d\d\] (\S+) +(.+)", process.stderr, re.MULTILINE)
    assert [name for name, _ in logged] == ["piqa", "winogrande", str(tmp_path / "text")], process.stderr
    assert process.stderr.count("\n") == 3, process.stderr
    written = json.loads((run / "evaluation.json").read_text())
    assert f"acc {written['results'][1]['scores'][0]['value']:.4f}" in logged[0][1]
    assert "byte_perplexity" in logged[2][1]
    assert [result["name"] for result in written["results"]] == [
        str(tmp_path / "text"),
        "piqa",
        "winogrande",
        "hellaswag",
    ]
    assert written["results"][1]["scores"][0]["metric"] == "acc" and written["results"][3]["problem"]
    assert not list(home.iterdir())  # no cache


def wrong(capsys, *words):
    """Run evaluate, which must exit with status 2, and return its one-line error."""
    assert main(["evaluate", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("antransformer: error: ") and error.count("\n") == 1
    return error


def test_wrong_options_and_files_are_refused(run, tmp_path, capsys, monkeypatch):
    words = ["--checkpoint", run]
    assert mentions(wrong(capsys, *words), "--tasks", "--text")
    assert mentions(wrong(capsys, *words, "--tasks=piqa", "--batch-size=0"), "--batch-size", "1", "0")
    assert mentions(wrong(capsys, *words, "--tasks=piqa", "--limit=0"), "--limit", "1", "0")
    assert mentions(
        wrong(capsys, *words, "--tasks=piqa", "--out", tmp_path / "no/file"), "--out", f"{tmp_path}/no/file"
    )
    assert mentions(wrong(capsys, "--checkpoint", "nowhere", "--tasks=piqa"), "nowhere")
    local = [*words, "--task-data", tmp_path]
    unknown = wrong(capsys, *local, "--tasks", "piqqa")
    assert mentions(unknown, "piqqa", "piqa", "--task-data", "lambada_openai", "hellaswag", "arc_easy")
    missing = wrong(capsys, *local, "--tasks=piqa")
    assert mentions(missing, str(tmp_path), "piqa", "piqa*val*.jsonl", "piqa*dev.jsonl")
    assert mentions(wrong(capsys, *words, "--task-data=nowhere", "--tasks=piqa"), "--task-data", "nowhere")
    write(tmp_path, {"piqa_val.jsonl": PIQA, "piqa/valid.jsonl": PIQA})
    assert mentions(wrong(capsys, *local, "--tasks=piqa"), str(tmp_path), "piqa", "piqa_val.jsonl", "piqa/valid.jsonl")
    for content, reason in (
        (b"\n", []),
        (b"ab\xff", ["UTF-8"]),
        (b"%PDF-1.7", ["PDF"]),
        (None, [os.strerror(errno.ENOENT)]),
    ):
        text = tmp_path / "text"
        text.unlink(missing_ok=True)
        if content is not None:
            text.write_bytes(content)
        assert mentions(wrong(capsys, *words, "--text", text), str(text), *reason)
    make_run(tmp_path / "ablated", ablation="no-lerp")
    (tmp_path / "piqa_val.jsonl").unlink()
    text.write_text("a text")
    ablated = wrong(capsys, "--checkpoint", tmp_path / "ablated", *local[2:], "--tasks=piqa", "--text", text)
    assert mentions(ablated, str(tmp_path / "ablated"), "no-lerp")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        assert mentions(wrong(capsys, *local, "--tasks=piqa", "--text", text), "lm_eval", "antransformer[eval]")
    with monkeypatch.context() as patch:  # a version without the names that the adapter imports
        patch.setitem(sys.modules, "lm_eval.api.group", types.ModuleType("lm_eval.api.group"))
        patch.delitem(sys.modules, "antransformer.interop.lm_eval_adapter")
        patch.delattr("antransformer.interop.lm_eval_adapter")
        assert mentions(
            wrong(capsys, *local, "--tasks=piqa", "--text", text),
            "lm_eval.api.group",
            "--upgrade",
            "antransformer[eval]",
        )


@pytest.mark.parametrize(
    ("task", "line", "parts"),
    [
        ("hellaswag", "{", ["JSON"]),
        ("hellaswag", "[]", ["JSON"]),
        ("hellaswag", '{"query": "a", "choices": ["b", "c"], "gold": 2}', ["gold", "'2'"]),
        ("hellaswag", json.dumps({**HELLASWAG[0], "endings": "abc"}), ["endings"]),
        ("hellaswag", json.dumps({**HELLASWAG[0], "endings": ENDINGS, "label": ""}), ["label", "''"]),
        ("piqa", '{"goal": "a", "sol1": "b"}', ["sol2"]),
        ("piqa", '{"goal": "\\ud800", "sol1": "b", "sol2": "c", "label": 0}', ["utf-8", "ud800"]),
        ("winogrande", '{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}', ["sentence", "_"]),
        ("winogrande", '{"sentence": "_", "option1": "b", "option2": "c", "answer": "3"}', ["answer", "'3'"]),
        ("arc_easy", json.dumps({**ARC_HUB[0], "answerKey": "E"}), ["answerKey", "'E'", "4"]),
        ("arc_easy", '{"question": "a", "choices": 5, "answerKey": "A"}', []),
        ("lambada_openai", '{"text": 5}', ["text"]),
        ("lambada_openai", '{"text": " "}', ["text"]),
    ],
)
def test_a_broken_line_is_named(run, tmp_path, capsys, task, line, parts):
    name, files, _ = FORMS[{"lambada_openai": "lambada", "arc_easy": "arc", "piqa": "piqa-hub"}.get(task, task)]
    path = write(tmp_path, files) / next(iter(files))
    path.write_text(path.read_text() + "\n" + line + "\n")
    number = len(files[next(iter(files))]) + 2
    error = wrong(capsys, "--checkpoint", run, "--tasks", name, "--task-data", tmp_path)
    assert mentions(error, str(path), str(number), *parts)


def test_a_broken_file_is_named(run, tmp_path, capsys):
    words = ["--checkpoint", run, "--task-data", tmp_path, "--tasks"]
    write(tmp_path, {"lambada_test.jsonl": []})
    assert mentions(wrong(capsys, *words, "lambada_openai"), f"{tmp_path}/lambada_test.jsonl")
    write(tmp_path, FORMS["piqa"][1] | {"piqa/valid-labels.lst": [0, 1]})
    assert mentions(wrong(capsys, *words, "piqa"), f"{tmp_path}/piqa/valid-labels.lst", "2", "3", "valid.jsonl")
    released, cleaned = (next(iter(FORMS[form][1].values())) for form in ("hellaswag", "hellaswag-cleaned"))
    write(tmp_path, {"hellaswag_val.jsonl": released + cleaned})
    assert mentions(wrong(capsys, *words, "hellaswag"), f"{tmp_path}/hellaswag_val.jsonl")
    write(tmp_path, {"hellaswag_val.jsonl": [{**HELLASWAG_HUB[0], "endings": ["a", "b" * 300, "c", "d"]}]})
    assert mentions(wrong(capsys, *words, "hellaswag"), "hellaswag", "301", "192")


def test_errors_of_the_hub_are_reported(run, capsys, monkeypatch):
    reason = "Couldn't reach\nthe Hub"

    def unreachable(**_):
        raise ConnectionError(reason)

    folders = [Path(lm_eval.tasks.__path__[0]) / name for name in (*lm_eval_adapter.FOLDERS, "gsm8k")]
    some_tasks = TaskManager(include_defaults=False, include_path=folders)  # the index of all takes 15 s
    monkeypatch.setattr(lm_eval_adapter, "task_manager", lambda all_tasks: some_tasks)
    words = ["--checkpoint", run, "--tasks"]
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert mentions(wrong(capsys, *words, "hellaswag"), "hellaswag", reason.replace("\n", " "), "--task-data")
    assert mentions(wrong(capsys, *words, "hellaswagg"), "hellaswagg", "hellaswag", "lambada_openai")
    rows = datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"train": rows, "test": rows})
    assert mentions(wrong(capsys, *words, "gsm8k"), "gsm8k")


@pytest.mark.slow
def test_the_index_of_all_tasks_has_those_of_the_small_one():
    small, large = (lm_eval_adapter.task_manager(all_tasks).task_index for all_tasks in (False, True))
    assert set(small) < set(large) and "gsm8k" in large


def test_the_tokenizer_has_our_ids():
    ours = byte_tokenizer()
    theirs = transformers_tokenizer(ours, CONTEXT)
    text = "naïve <|endoftext|> 日本\n"
    assert theirs(text).input_ids == ours.encode(text) and theirs.eos_token_id == theirs.bos_token_id == END
