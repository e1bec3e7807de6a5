"""The verbs compare and ablate, with real runs."""

import json
import re
from collections import Counter

import pytest
import yaml

from antransformer.cli import main
from antransformer.comparison.ablate import suite
from antransformer.results.comparison import Results
from antransformer.results.observations import read_observations
from antransformer.runs import timing
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS

pytestmark = pytest.mark.usefixtures("in_process")
SHORT = ["--precision=float32", "--batch-tokens=256", "--eval-tokens=1024", "--workers=2", *SMALL_OPTIONS]


def compare(corpus, out, *more):
    effort = ["--seeds=2", "--lr-trials=1", "--tuning-trials=1", "--budgets", "2560", "5120"]
    return ["compare", "--recipe=paper", "--data", str(corpus), "--out", str(out), *effort, *SHORT, *more]


@pytest.fixture(scope="module")
def compared(corpus, in_process, tmp_path_factory):
    """Folder of a finished small comparison."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert main(compare(corpus, folder)) == 0
    return folder


def test_compare_writes_runs_results_and_a_report(compared):
    results = Results.load(compared)
    assert [variant.name for variant in results.variants] == ["gpt+", "angpt"]
    assert results.budgets == (2560, 5120) and results.seeds == (1, 2)
    for variant in results.variants:
        assert len(variant.runs) == 4
        for run in variant.runs:
            result = json.loads((compared / "runs" / run.folder / "result.json").read_text())
            assert result["loss"] == run.loss and 0 < run.loss < 6
    page = (compared / "report.html").read_text()
    assert "anGPT" in page and "GPT+" in page and len(list(compared.glob("*.png"))) >= 4


def test_fit_reads_a_comparison(compared, capsys, tmp_path):
    rows = read_observations([compared]).runs
    assert {(row.architecture, row.batch, row.tokens) for row in rows} == {
        (name, 256, tokens) for name in ("gpt+", "angpt") for tokens in (2560, 5120)
    }
    assert len(rows) == 8 and all(row.lr > 0 and row.parameters > 1000 for row in rows)
    assert main(["fit", str(compared), "--out", str(tmp_path / "charts")]) == 0
    assert mentions(capsys.readouterr().out, *["GPT+", "anGPT"])


@pytest.mark.parametrize("option", ["--recipe=best", "--schedule=linear", "--model.rope-theta=500"])
def test_a_folder_of_another_comparison_is_refused_and_stays_as_it_is(compared, corpus, option, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("*") if path.is_file()}
    assert main(compare(corpus, compared, option)) == 2
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    assert mentions(capsys.readouterr().err, str(compared / "runs"), name, "--out")
    assert before == {path: path.stat().st_mtime_ns for path in compared.rglob("*") if path.is_file()}


def marks_of_runs(out):
    """Count the progress lines of runs: those of cached runs have a remark after the loss, new ones do not."""
    return Counter("cached" if mark.strip() else "new" for mark in re.findall(r" \d+/\d+ .* \d+\.\d{4}\b(.*)", out))


def test_the_same_command_runs_nothing_again_and_more_seeds_add_the_missing_runs(compared, corpus, capfd):
    before = {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/result.json")}
    assert main(compare(corpus, compared)) == 0
    out = capfd.readouterr().out
    assert marks_of_runs(out) == Counter(cached=8) and str(compared / "report.html") in out
    assert main(compare(corpus, compared, "--seeds=3", "--budgets", "2560")) == 0
    out = capfd.readouterr().out
    assert marks_of_runs(out) == Counter(cached=4, new=2)
    after = {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/result.json")}
    assert len(after) == 10 and before.items() <= after.items()


def test_compare_searches_at_every_budget_and_a_new_budget_is_searched_too(corpus, tmp_path, capfd, monkeypatch):
    options = ["--lr-trials=2", "--seeds=1", "--budgets", "2560"]
    assert main(compare(corpus, tmp_path, *options)) == 0
    first = Results.load(tmp_path)
    planned = re.search(r" (\d+) runs, (\d+\.\d)M tokens", capfd.readouterr().out)
    assert planned and int(planned[1]) == 2 * (2 + 2 + 1)
    assert main(compare(corpus, tmp_path, *options, "5120")) == 0
    out, results = capfd.readouterr().out, Results.load(tmp_path)
    assert marks_of_runs(out)["cached"] == sum(len(item.trials) + 1 for item in first.variants)
    for before, item in zip(first.variants, results.variants, strict=True):
        assert item.chosen[0] == before.chosen[0] and item.trials[: len(before.trials)] == before.trials
        for tokens in results.budgets:
            trials = [trial for trial in item.trials if trial.tokens == tokens]
            lr = min(trials, key=lambda trial: trial.loss).value
            assert item.settings_at(tokens)["lr"] == lr and item.search_budget("lr", tokens) == tokens
            assert f"{item.name}-{tokens}-lr{lr:g}-seed1" in {run.folder for run in item.runs}
    assert "5.12K (tuned)" in (tmp_path / "report.html").read_text()
    searches = read_observations([tmp_path]).searches
    assert {row.tokens for row in searches} == {2560, 5120}
    assert len(searches) == sum(len(item.trials) for item in results.variants)
    monkeypatch.setattr(timing, "seconds_per_token", None)  # a finished comparison is not timed
    assert main(compare(corpus, tmp_path, *options, "5120")) == 0
    assert marks_of_runs(capfd.readouterr().out)["new"] == 0


@pytest.mark.slow  # 40 runs; tests/comparison/test_experiment.py has the rules of the search
def test_compare_searches_separate_rates(corpus, tmp_path):
    options = ["--tuning-trials=2", "--seeds=1", "--budgets", "2560"]
    assert main(compare(corpus, tmp_path, *options)) == 0
    results = Results.load(tmp_path)
    for item in results.variants:
        assert {"embed_lr", "head_lr"} < {trial.setting for trial in item.trials}
        (run,), chosen = item.runs, item.settings_at(2560)
        saved = yaml.safe_load((tmp_path / "runs" / run.folder / "config.yaml").read_text())
        rates = ("embed_lr", "head_lr", "vector_lr")
        assert {name: saved.get(name, saved["lr"]) for name in rates}.items() <= chosen.items()
        assert item.search_budget("lr", 2560) == 0 and item.search_budget("embed_lr", 2560) == 2560
    assert "2.56K (tuned)" not in (tmp_path / "report.html").read_text()


def test_ablate_runs_the_default_and_the_selected_variants(corpus, tmp_path, capfd):
    arguments = [
        "ablate",
        "--data",
        str(corpus),
        "--out",
        str(tmp_path),
        "--only",
        "all-x2",
        "--tokens=2560",
        "--seeds=2",
    ]
    assert main([*arguments, *SHORT]) == 0
    out = capfd.readouterr().out
    assert "default-2560" in out and "all-x2-2560" in out
    results = Results.load(tmp_path)
    assert [variant.name for variant in results.variants] == ["default", "all-x2"]
    assert results.variants[1].settings["model.ablation"] == "all-x2"
    assert "all-x2" in (tmp_path / "report.html").read_text()


def test_the_list_of_ablations(capsys):
    assert main(["ablate", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(suite(128)) and all(len(line.split()) > 1 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["compare", "--seeds=0"], "--seeds 1 0"),
        (["compare", "--seeds=many"], "--seeds many"),
        (["compare", "--architectures", "gpt+", "angtp"], "architecture angtp angpt"),
        (["compare", "--architectures", "angpt"], "--architectures angpt"),
        (["compare", "--budgets", "100", "5120"], "100 256 --budgets --batch-tokens"),
        (["compare", "--budgets", "5K", "5K"], "--budgets 5K"),
        (["compare", "--trial-tokens", "few"], "--trial-tokens few"),
        (["compare", "--separate-rates", "--tuning-trials=1"], "--separate-rates --tuning-trials 2 1"),
        (["compare", "--workers=0"], "--workers 1 0"),
        (["compare", "--devices", "tpu"], "device tpu cpu"),
        (["compare", "--model.vocab-size=20"], "256 20 model.vocab_size 257"),
        (["compare", "--lr=1"], "--lr"),
        (["compare", "--recipe=beste"], "recipe beste best paper"),
        (["compare", "--schedule=wsd"], "wsd decay_fraction"),
        (["compare", "--horizon-exponent=0.5"], "horizon_exponent lr_horizon"),
        (["compare", "--data", "nowhere"], "nowhere"),
        (["ablate", "--only", "no-lrep"], "no-lrep no-lerp"),
        (["ablate", "--tokens", "10"], "10 256 --tokens --batch-tokens"),
    ],
)
def test_a_usage_error_is_one_line_with_status_2(arguments, facts, corpus, capsys, tmp_path):
    verb, *rest = arguments
    assert main([verb, "--data", str(corpus), "--out", str(tmp_path / "out"), *SHORT, *rest]) == 2
    captured = capsys.readouterr()
    assert mentions(captured.err, *facts.split()) and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_with_runs_of_other_settings_is_refused(compared, corpus, capsys):
    assert main(compare(corpus, compared, "--batch-tokens=512")) == 2
    assert mentions(capsys.readouterr().err, *["batch_tokens", "256", "512", "--out"])
