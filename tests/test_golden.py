"""Training computes what it computed before names and files moved, and folders written then still work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from antransformer.cli import main
from antransformer.results.comparison import Results
from antransformer.results.observations import read_observations
from helpers.golden import ARCHITECTURES, GOLDEN, compare, logits_of, losses, processor_probe

EXPECTED = json.loads((GOLDEN / "golden.json").read_text())
SAME_PROCESSOR = processor_probe() == EXPECTED["processor"]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old folders, to work in."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")


def assert_equal(measured, expected, tolerance, exact=SAME_PROCESSOR):
    """Bit for bit on a processor that rounds as the one where the file was made, within the tolerance elsewhere."""
    torch.testing.assert_close(
        torch.tensor(measured, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0 if exact else tolerance,
        atol=0,
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ten_steps(architecture, optimizer, precision):
    measured = losses(GOLDEN / "data", architecture, optimizer, precision)
    tolerance = 1e-5 if precision == "float32" and optimizer == "adam" else 1e-2  # Muon multiplies in bfloat16
    # Attention in bfloat16 had other rounding errors when the file was made.
    exact = SAME_PROCESSOR and precision == "float32"
    assert_equal(measured, EXPECTED["losses"][f"{architecture} {optimizer} {precision}"], tolerance, exact)


def test_an_old_run_resumes(old):
    assert main(["train", "--out", "run", "--resume"]) == 0
    lines = {line["step"]: line for line in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())}
    measured = [lines[15]["loss"], lines[20]["loss"], lines[20]["val_loss"]]
    assert_equal(measured, list(EXPECTED["resumed"].values()), 1e-5)


def test_an_old_run_generates_and_is_exported(old, capsys):
    assert main(["generate", "--checkpoint", "run", "--max-new-tokens", "5"]) == 0
    assert main(["export", "--checkpoint", "run", "--out", "again"]) == 0
    # Exported models multiplied the factors into the weights when the file was made, which rounds differently.
    assert_equal(logits_of(Path("again")), EXPECTED["logits"], 1e-5, exact=False)


def test_an_old_exported_folder_loads_and_is_imported(old):
    assert_equal(logits_of(Path("exported")), EXPECTED["logits"], 1e-5, exact=False)
    assert main(["import", "exported", "--out", "back"]) == 0
    assert main(["train", "--init", "back", "--data", "data", "--tokens", "256", "--batch-tokens", "128"]) == 0


def test_old_data_is_added_to_nothing_and_trained_on(old):
    arguments = ["train", "--data", "data", "--preset", "pico", "--context", "32", "--tokens", "256"]
    assert main([*arguments, "--batch-tokens", "128", "--out", "new"]) == 0


def test_an_old_comparison_reports_and_runs_nothing_again(old, capfd):
    before = Results.load(Path("comparison"))
    compare(Path("data"), "comparison")
    assert capfd.readouterr().out.count("(done before)") == 8
    after = Results.load(Path("comparison"))
    for new, old_one in zip(after.variants, before.variants, strict=True):
        assert old_one.settings.items() <= new.settings.items()  # a setting that compare tunes now is new
        assert replace(new, settings=old_one.settings) == old_one
    assert (Path("comparison") / "report.html").stat().st_size > 10_000


def test_a_comparison_measures_what_it_measured(old, in_process):
    compare(Path("data"), "again")
    again, before = (Results.load(Path(folder)) for folder in ("again", "comparison"))
    for new, old_one in zip(again.variants, before.variants, strict=True):
        assert new.name == old_one.name and old_one.settings.items() <= new.settings.items()
        losses_of = [item.losses(before.budgets, before.seeds).ravel().tolist() for item in (new, old_one)]
        assert_equal(*losses_of, 1e-5)


def test_old_sweeps_and_comparisons_are_fitted(old):
    assert {row.lr for row in read_observations([Path("sweep")]).runs} == {1e-3, 1e-2, 2e-2}
    assert len(read_observations([Path("comparison")]).runs) == 8
