"""Records of experiments: checked when they are read, and readable in the versions of earlier releases."""

import json
import math
from pathlib import Path

import pytest

from antransformer.comparison.tuning import tuning_label
from antransformer.errors import DataError
from antransformer.results.comparison import Results
from antransformer.results.sweep import Sweep
from helpers.experiments import experiment, variant
from helpers.messages import mentions

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def comparison(tmp_path):
    """Content of the file of a comparison in which one run diverged."""
    experiment(variant("gpt+", 1.0), variant("angpt", 1.5, diverged=[(250_000, 1)])).save(tmp_path)
    return json.loads((tmp_path / "results.json").read_text())


def load_results(folder, content):
    (folder / "results.json").write_text(json.dumps(content))
    return Results.load(folder)


def test_a_diverged_run_is_null_in_the_file_and_infinite_in_the_results(tmp_path, comparison):
    assert [comparison["variants"][1]["runs"][0][key] for key in ("loss", "bits_per_byte")] == [None, None]
    run = load_results(tmp_path, comparison).variants[1].runs[0]
    assert run.loss == run.bits_per_byte == math.inf


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss", -1.0), ("loss", "3"), ("loss", 0.0), ("tokens", 0), ("tokens", 1.5), ("tokens", True), ("seed", 2**63),
     ("folder", "../x"), ("folder", "")],
)  # fmt: skip
def test_a_wrong_value_of_a_run_is_refused(tmp_path, comparison, key, value):
    comparison["variants"][0]["runs"][0][key] = value
    with pytest.raises(DataError) as error:
        load_results(tmp_path, comparison)
    assert mentions(error.value, tmp_path / "results.json", key) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("setup", []), ("budgets", 5), ("budgets", [2, 1]), ("seeds", []), ("kind", "sweep"), ("variants", {})],
)
def test_a_wrong_value_of_an_experiment_is_refused(tmp_path, comparison, key, value):
    with pytest.raises(DataError) as error:
        load_results(tmp_path, {**comparison, key: value})
    assert mentions(error.value, tmp_path / "results.json", key)


def test_seeds_and_tuned_values_may_be_zero(tmp_path, comparison):
    comparison["variants"][0]["trials"] = [
        {"setting": "weight_decay", "value": 0.0, "loss": 3.0, "folder": "x", "tokens": 1, "pass_number": 1}
    ]
    comparison["variants"][0]["runs"].append({**comparison["variants"][0]["runs"][0], "seed": 0})
    baseline = load_results(tmp_path, comparison).baseline
    assert baseline.trials[0].value == 0 and baseline.runs[-1].seed == 0


def test_another_format_or_a_later_version_is_refused(tmp_path, comparison):
    for change in ({"version": 6}, {"version": "5"}, {"version": 0}, {"format": "antransformer-sweep"}):
        with pytest.raises(DataError) as error:
            load_results(tmp_path, {**comparison, **change})
        assert mentions(error.value, tmp_path / "results.json", "antransformer-results", 5)


def test_a_comparison_of_version_1_has_variants_and_the_new_names_of_settings():
    old = json.loads((GOLDEN / "comparison" / "results.json").read_text())
    results = Results.load(GOLDEN / "comparison")
    assert old["version"] == 1 and [item.name for item in results.variants] == [
        entry["name"] for entry in old["contenders"]
    ]
    settings = old["contenders"][0]["settings"]
    assert results.baseline.settings["warmup_fraction"] == settings["warmup"]


def test_a_comparison_of_version_2_has_one_search_for_all_budgets(tmp_path, comparison):
    for entry in comparison["variants"]:
        del entry["chosen"]
        entry["settings"] |= {"muon_lr": 0.02, "weight_decay": 0.3}
        entry["trials"] = [{"setting": "lr", "value": 0.004, "loss": 3.0, "folder": "x"}]
    old = {**comparison, "version": 2, "trial_tokens": 500_000}
    results = load_results(tmp_path, old)
    for item in results.variants:
        assert [(part.tokens, part.trial_tokens) for part in item.chosen] == [
            (tokens, 500_000) for tokens in results.budgets
        ]
        assert all(part.settings == {"lr": 0.004, "muon_lr": 0.02} for part in item.chosen)
        assert item.trials[0].tokens == item.search_budget("lr", 250_000) == 500_000
        assert item.trials[0].pass_number == 1
        assert item.search_budget("muon_lr", 250_000) == 0
    assert [tuning_label(results, tokens) == "tuned" for tokens in results.budgets] == [False, True, False]
    results.save(tmp_path)
    assert Results.load(tmp_path) == results


def test_an_old_comparison_without_a_search_has_default_rates():
    results = Results.load(GOLDEN / "comparison")
    for item in results.variants:
        assert [item.search_budget("lr", tokens) for tokens in results.budgets] == [0, 0]
        assert item.settings_at(results.budgets[0])["lr"] == item.settings["lr"]
    assert {tuning_label(results, tokens) for tokens in results.budgets}.isdisjoint({"tuned"})


def test_a_sweep_of_version_2_has_rotations_in_degrees_and_the_new_names_of_settings(tmp_path):
    old = json.loads((GOLDEN / "sweep" / "sweep.json").read_text())
    sweep = Sweep.load(GOLDEN / "sweep")
    assert old["version"] == 2 and len(sweep.coord_check) == len(old["coordinates"]) > 0
    for sizes, entry in zip(sweep.coord_check, old["coordinates"], strict=True):
        assert list(sizes.rotation_deg) == entry["turned"] and sizes.width == entry["width"]
        assert sizes.conditions == ("pico", 128, math.inf)
    assert sweep.setup["settings"]["model.head_dim"] == old["setup"]["settings"]["model.head_width"]
    sweep.save(tmp_path)
    assert Sweep.load(tmp_path) == sweep
