"""The verb demo, end to end with a smaller model."""

import re
import sys

import pytest

from antransformer.cli import main
from antransformer.training import config_files


@pytest.fixture(autouse=True)
def small_demo(corpus, tmp_path, monkeypatch):
    """A smaller model in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    settings = {"data": str(corpus), "batch_tokens": 256, "tokens": 5120, "context": 32, "model": {"layers": 1}}
    monkeypatch.setattr(config_files, "read_config", lambda name: settings)


def test_demo_trains_draws_and_generates(tmp_path, capsys):
    assert main(["demo", "--out", "runs/demo"]) == 0
    out = capsys.readouterr().out
    gzip = float(re.search(r"gzip -9\D*(\d\.\d+)", out)[1])
    assert 1 < gzip < 4
    figure = (tmp_path / "runs/demo/loss.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 10_000
    assert re.search(r"^def .", out, re.M)  # the sample


def test_demo_without_matplotlib_says_so_first_and_writes_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("antransformer.cli.demo.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--out", "runs/demo", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert "antransformer[plots]" in out.splitlines()[0] and re.search(r"^def .", out, re.M)
    assert not (tmp_path / "runs/demo/loss.png").exists()


def test_demo_in_an_occupied_folder_gives_no_advice_that_it_cannot_take(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    assert main(["demo", "--out", "full"]) == 2
    error = capsys.readouterr().err
    assert "full" in error and "--out" in error and "--resume" not in error
