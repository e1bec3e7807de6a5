"""Odd inputs of every verb: one line, status 2, and nothing left behind."""

import json
import os
import shutil
from pathlib import Path

import pytest

from antransformer.cli import main
from antransformer.errors import ConfigError
from antransformer.training.distributed.launcher import launch
from helpers.commands import TEN_STEPS, refused
from helpers.exported import make_run
from helpers.messages import mentions

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Current folder with a comparison, a run, and files that are not what a verb expects."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "comparison", "compared")
    make_run(tmp_path / "run")
    shutil.copytree("run", "bare", ignore=shutil.ignore_patterns("config.yaml"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "twice.yaml").write_text("lr: 1e-3\nseed: 1\nlr: 2e-3\n")
    (tmp_path / "nested.yaml").write_text("model:\n  width: 64\n  width: 128\n")
    (tmp_path / "number.json").write_text('{"angpt": 1}')
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def listing(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("fit compared compared", ["compared"]),
        ("fit compared ./compared/../compared", ["compared"]),
        ("fit pipe", ["pipe"]),
        ("fit compared --json compared/results.json", ["--json", "compared/results.json"]),
        ("fit compared --json number.json", ["--json", "number.json"]),
        ("fit compared --out run", ["run", "--out"]),
        ("plan --flops 1", ["--flops", 1]),
        ("plan --hours 1e-12 --gpus 8", ["--hours"]),
        ("train --out file/new", ["file", "--out"]),
        ("train --out=", ["--out"]),
        ("train --config twice.yaml", ["twice.yaml", "lr", 3]),
        ("train --config nested.yaml", ["nested.yaml", "width", 3]),
        ("train --config /dev/zero", ["/dev/zero"]),
        ("train --init run --preset 125m", ["run", "model.width", 64, 512]),
        ("train --out " + "x" * 300, []),
        ("demo --out file/new", ["file", "--out"]),
        ("demo --tokens=", ["--tokens"]),
        ("compare --tokens 1M --budgets 1M 2M", ["tokens", "budgets"]),
        ("compare --devices cpu --workers 2", ["devices", "workers"]),
        ("sweep --devices cpu --workers 2", ["devices", "workers"]),
        ("ablate --data=", ["--data"]),
        ("serve --gguf file --dtype f16", ["dtype", "f16", "file"]),
        ("bench step --threads 99999999999", ["--threads", 99999999999]),
        ("evaluate --checkpoint run --text /dev/zero", ["/dev/zero"]),
        ("evaluate --checkpoint run --text file --out run/config.yaml", ["--out", "run/config.yaml"]),
        ("diagnose --checkpoint bare", ["bare", "config.yaml", "--data"]),
        ("diagnose --checkpoint run --json compared/results.json", ["--json", "compared/results.json"]),
    ],
)
def test_odd_inputs_are_refused_in_one_line(place, words, parts, capsys):
    before = listing(place)
    error = refused(words.split(" "), capsys)
    assert mentions(error, *parts) and listing(place) == before


def test_an_empty_prompt_is_a_prompt(place, capsys):
    assert main(["generate", "--checkpoint", "run", "--prompt", "", "--max-new-tokens", "2", "--device", "cpu"]) == 0


def test_a_device_is_written_and_not_read(place, capsys):
    """/dev/full never ends when it is read, and is full when it is written."""
    words = ["bench", "optimizer", "--rounds=1", "--preset=pico", "--model.vocab-size=300", "--json=/dev/full"]
    assert main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "fit compared --out charts --json pipe",
        "evaluate --checkpoint run --text file --device cpu --out pipe",
        "bench optimizer --rounds 1 --preset pico --model.vocab-size 300 --json pipe",
    ],
)
def test_results_go_through_a_pipe_and_do_not_replace_it(place, words, capsys):
    with os.fdopen(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as reader:
        assert main(words.split()) == 0
        assert json.loads(reader.read()) and Path("pipe").is_fifo()


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "MASTER_PORT"),
        ({"TORCHELASTIC_MAX_RESTARTS": "often"}, "TORCHELASTIC_MAX_RESTARTS"),
    ],
)
def test_a_job_that_torchrun_did_not_describe_is_refused(corpus, place, environment, name, monkeypatch, capsys):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    before = listing(place)
    error = refused(["train", "--data", corpus, "--out", "new", "--device=cpu", *TEN_STEPS], capsys)
    assert mentions(error, name) and listing(place) == before


def test_no_ranks_are_started_for_a_wrong_number():
    with pytest.raises(ConfigError):
        launch(["train"], 0)
