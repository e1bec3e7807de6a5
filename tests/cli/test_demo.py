"""The verb demo, end to end with a smaller model."""

import re

from antransformer.cli import main
from antransformer.training import config_files


def test_demo_trains_draws_and_generates(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {"data": str(corpus), "batch_tokens": 256, "tokens": 5120, "context": 32, "model": {"layers": 1}}
    monkeypatch.setattr(config_files, "read_config", lambda name: settings)
    assert main(["demo", "--out", "runs/demo"]) == 0
    out = capsys.readouterr().out
    gzip = float(re.search(r"gzip -9\D*(\d\.\d+)", out)[1])
    assert 1 < gzip < 4
    figure = (tmp_path / "runs/demo/loss.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 10_000
    assert re.search(r"^def .", out, re.M)  # the sample
