"""Model cards of exported folders."""

import json

import pytest
import yaml

from antransformer.cli import main
from antransformer.comparison.summary import summary
from antransformer.errors import CheckpointError
from antransformer.interop.export import export
from antransformer.interop.model_card import card
from antransformer.results.comparison import ChosenSettings, Results, Run, Variant
from antransformer.training import run_folder as runs
from helpers.exported import exported, has_row, make_run
from helpers.messages import mentions

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


def test_the_card_describes_the_training(tmp_path):
    ours, folder = exported(tmp_path, summary="anGPT won.")
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
    assert mentions(text, f"{ours.parameter_count():,}", "anGPT won.") and "antransformer.bind(" in text
    for parts in (
        ("2505.22014",),  # the paper of the architecture
        ("64", "3", "4", "16", "48"),
        ("mine",),
        ("3,840", "20", "192"),
        ("0.012", "0.017", "0.024", "1%", "9,600"),
        ("2.7500",),
        ("2.8750", "4.2500"),
    ):
        assert has_row(text, *parts), parts
    assert not has_row(text, "10%")  # no warm-up
    export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "again")
    again = (tmp_path / "again/README.md").read_text()
    assert again.count("\n## ") == text.count("\n## ") - 1 and "anGPT won." not in again
    plain = (exported(tmp_path / "gpt+", "gpt+")[1] / "README.md").read_text()
    assert "antransformer.bind" not in plain and has_row(plain, "10%", "1%", "9,600")


def test_the_card_of_a_run_in_an_experiment_has_its_summary(tmp_path):
    runs_of = {"gpt+": (3.0, 3.2), "angpt": (2.0, 2.1)}
    variants = tuple(
        Variant(
            name,
            {},
            1000,
            (),
            tuple(Run(9_600, seed, loss, loss, 1.0, name) for seed, loss in enumerate(losses, 1)),
            (ChosenSettings(9_600, 0, {"lr": 0.01}),),
        )
        for name, losses in runs_of.items()
    )
    results = Results("compare", {}, (9_600,), (1, 2), variants)
    make_run(tmp_path / "runs/angpt")
    words = ["export", "--checkpoint", str(tmp_path / "runs/angpt"), "--out"]
    (tmp_path / "results.json").write_text("somebody else's")
    assert main([*words, str(tmp_path / "before")]) == 0
    results.save(tmp_path)
    (tmp_path / "report.html").touch()
    for name in ("loss-tokens.png", "alpha-angpt.png"):
        (tmp_path / name).write_bytes(name.encode())
    assert main([*words, str(tmp_path / "after")]) == 0
    before, text = ((tmp_path / name / "README.md").read_text() for name in ("before", "after"))
    assert text.count("\n## ") == before.count("\n## ") + 1
    assert mentions(text, summary(results), "GPT+") and not mentions(before, "GPT+")
    assert "![loss-tokens](loss-tokens.png)" in text and ".png" not in text.replace("loss-tokens.png", "")
    assert (tmp_path / "after/loss-tokens.png").read_bytes() == b"loss-tokens.png"


def test_the_card_has_only_the_scores_of_its_step(tmp_path):
    make_run(tmp_path / "run")
    part = {"task": "blimp_part", "metric": "acc", "value": 0.25, "stderr": None, "items": 8}
    group = {**part, "task": "blimp", "value": 0.5, "stderr": 0.125, "items": 1000}
    infinite = {**part, "task": "book.txt", "value": None}
    private = {**part, "task": "/home/me/wiki.txt"}
    results = [{"name": "blimp", "scores": [group, part]}, {"name": "book.txt", "scores": [infinite]}]
    results.append({"name": "/home/me/wiki.txt", "scores": [private]})
    file = tmp_path / "run/evaluation.json"
    file.write_text(json.dumps({"step": 20, "results": results}))
    opened, tokenizer = runs.open_checkpoint(tmp_path / "run")
    text = card(opened, tokenizer, "name", "native", "float32", "checked")
    assert "| blimp | acc | 0.5000 ± 0.1250 | 1,000 |" in text
    assert "blimp_part" not in text and "book.txt" not in text
    assert "| wiki.txt | acc |" in text and "/home/me" not in text
    file.write_text(file.read_text().replace("20", "10"))
    other = card(opened, tokenizer, "name", "native", "float32", "checked")
    assert "blimp" not in other and other.count("\n## ") == text.count("\n## ") - 1
    for content in ("{", "[]", '{"step": 20}'):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"run/evaluation\.json"):
            card(opened, tokenizer, "name", "native", "float32", "checked")
