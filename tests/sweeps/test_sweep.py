"""The grid search of a sweep with simulated losses, its report and files, and the verb with real runs."""

import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from antransformer.cli import main, sweep
from antransformer.data import Dataset
from antransformer.diagnostics.coord_check import STEPS, CoordCheck, coord_check
from antransformer.errors import ConfigError, DataError
from antransformer.results.observations import read_observations, sweep_observations
from antransformer.results.sweep import Sweep, SweepRun
from antransformer.runs.search import EXTENSIONS
from antransformer.scaling.fits import fit
from antransformer.sweeps import report as sweep_report
from antransformer.sweeps.charts import law, regret, token_budgets
from antransformer.sweeps.sweep import LR_RATIO, Sweeper, check_choices, plan
from antransformer.training.config import resolve_config
from antransformer.training.run_folder import saved_config
from helpers.fake_queue import FakeQueue
from helpers.small import SMALL

pytestmark = pytest.mark.usefixtures("in_process")
COMMON = {"model": {name: value for name, value in SMALL.items() if name != "width"}}
WIDTHS = (32, 64, 96, 128)
OPTIONS = ["--model.layers=1", "--model.context=32", "--model.head-dim=16", "--eval-tokens=1024", "--workers=2"]
TINY = ["--widths", "16", "--batch-tokens", "256", "--tokens", "1K"]


def best_lr(config):
    """Best learning rate: that of GPT+ falls with the width, that of anGPT is constant."""
    return 1e-2 * ((config.model.width / 64) ** -0.5 if config.model.architecture == "gpt+" else 1.0)


def bowl(config):
    """Loss that is quadratic in log learning rate and log batch."""
    off = math.log(config.lr / best_lr(config)) ** 2 + math.log(config.batch_tokens / 512) ** 2
    return 3 + 0.1 * off + 10 / config.model.width + 100 / config.tokens


def sweeper(corpus, loss=bowl, common=COMMON, **choices):
    dataset = Dataset.open(corpus)
    cells = {"architectures": ["angpt", "gpt+"], "sizes": ["nano"], "tokens": [20_000], "batches": [512]}
    sweep_plan = plan(common, dataset.vocab_size, **{**cells, "trials": 3, **choices})
    return Sweeper(sweep_plan, dataset, FakeQueue(loss), lambda words: None)


def run_sweep(corpus, **choices):
    """Run a sweep with invented activations instead of those of real models."""
    fake = sweeper(corpus, **choices)
    fake.coordinates = lambda earlier: tuple(
        CoordCheck(
            name,
            "nano",
            width,
            512,
            0.012,
            step,
            (width**-0.5, 1.0, math.inf if step else 2.0),
            1.0,
            (30.0, 60.0, math.inf) if step else (),
        )
        for name in ("angpt", "gpt+")
        for width in WIDTHS
        for step in (0, STEPS)
    )
    return fake.run()


def test_the_grid_of_rates_is_extended_until_the_best_is_inside(corpus):
    results = sweeper(corpus).run()
    rates = [run.lr for run in results.runs if run.architecture == "angpt"]
    assert rates == [5.57e-3, 1.2e-2, 2.59e-2] and rates[1] / rates[0] == pytest.approx(LR_RATIO, rel=0.01)
    extended = sweeper(corpus, loss=lambda config: abs(math.log(config.lr / 0.08)), architectures=["angpt"]).run()
    assert [run.lr for run in extended.runs] == [5.57e-3, 1.2e-2, 2.59e-2, 5.58e-2, 0.12]
    unbounded = sweeper(corpus, loss=lambda config: 1 / config.lr, architectures=["angpt"]).run()
    assert len(unbounded.runs) == 3 + EXTENSIONS


def test_given_rates_are_not_extended(corpus):
    results = sweeper(corpus, loss=lambda config: 1 / config.lr, lrs=[1e-3, 2e-3], seeds=2).run()
    tried = [(run.lr, run.seed) for run in results.runs if run.architecture == "angpt"]
    assert tried == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]


def test_all_sizes_get_the_longest_context_and_whole_batches(corpus):
    dataset = Dataset.open(corpus)
    sweep_plan = plan(
        {}, dataset.vocab_size, ["gpt+", "angpt"], ["pico", "nano"], batches=[1024, 2048], ratios=[1, 2], trials=2
    )
    search = Sweeper(sweep_plan, dataset, FakeQueue(bowl), lambda words: None)
    cells = list(sweep_plan.grids)
    assert len(cells) == 2 * 2 * 2 * 2
    for cell in cells:
        config = search.config(cell, 1e-3, 0)
        assert config.model.context == 256 and config.tokens % 2048 == 0 and config.steps * cell.batch == cell.tokens
    # The parameters of the architectures differ slightly, but their tokens do not.
    assert {cell.tokens for cell in cells if cell.architecture == "gpt+"} == {
        cell.tokens for cell in cells if cell.architecture == "angpt"
    }


def test_all_widths_get_the_same_batch_and_rates(corpus):
    search = sweeper(corpus, widths=(32, 512), batches=())
    assert {cell.batch for cell in search.plan.grids} == {2048}
    assert len({grid for cell, grid in search.plan.grids.items() if cell.architecture == "gpt+"}) == 1
    assert {search.config(cell, 1e-3, 0).model.width for cell in search.plan.grids} == {32, 512}


def test_all_widths_get_the_lr_width_of_the_preset_or_the_given_one():
    def rules(preset, **settings):
        names, batches = ["angpt", "gpt+"], [2048]
        sweep_plan = plan(settings, 257, names, [preset], widths=(64, 512), batches=batches, tokens=[20_000])
        return {(cell.architecture, settings["lr_width"]) for cell, settings in sweep_plan.settings.items()}

    assert rules("nano") == {("angpt", 128), ("gpt+", 128)}
    assert rules("32m") == {("angpt", 0), ("gpt+", 0)}  # also for a width with fewer than 30M parameters
    assert rules("nano", lr_width=0) == {("angpt", 0), ("gpt+", 0)}


def test_with_lr_width_a_step_rotates_the_residual_stream_equally_at_four_times_the_width(corpus):
    def rotation(width, **rule):
        model = {**COMMON["model"], "width": width}
        settings = {"model": model, "batch_tokens": 512, "tokens": 5120, "data": str(corpus), "lr": 1e-2, **rule}
        config = resolve_config(settings, 257)
        return np.array(coord_check(config, Dataset.open(corpus))[1].rotation_deg)

    narrow = rotation(32, lr_width=32)
    assert rotation(128, lr_width=32) == pytest.approx(narrow, rel=0.1)
    assert rotation(128, lr_width=0)[0] > 1.3 * narrow[0]


def test_finished_runs_are_not_counted_as_missing(corpus):
    search = sweeper(corpus, architectures=["angpt"], seeds=2)
    (cell,) = search.plan.grids
    assert search.missing(cell) == (6, 6 + 2 * EXTENSIONS)
    search.queue.run(search.jobs(cell, 1.2e-2))
    assert search.missing(cell) == (4, 4 + 2 * EXTENSIONS)
    search.run()
    assert search.missing(cell) == (0, 0)


def test_fit_recovers_the_laws_of_a_sweep(corpus, tmp_path):
    common, choices = {**COMMON, "lr_width": 0}, {"batches": [256, 512, 1024], "tokens": [20_480, 40_960]}
    results = run_sweep(corpus, common=common, widths=WIDTHS, **choices)
    results.save(tmp_path)
    assert Sweep.load(tmp_path) == results
    observed = read_observations([tmp_path])
    assert observed.searches == observed.runs == tuple(sweep_observations(results)) and not observed.scaled
    laws = {fitted.name: fitted.laws for fitted in fit(observed)}
    assert laws["gpt+"]["lr"].exponent == pytest.approx(-0.5, abs=0.02)
    assert laws["angpt"]["lr"].exponent == pytest.approx(0.0, abs=0.02)


def test_rates_are_scaled_at_all_widths_but_the_one_that_they_are_for(corpus, tmp_path):
    for name, choices, scaled in (
        ("one width", {"sizes": ["pico", "nano"]}, set()),
        ("several widths", {"sizes": ["nano", "32m"], "common": {**COMMON, "lr_width": 128}}, {"angpt", "gpt+"}),
    ):
        (tmp_path / name).mkdir()
        sweeper(corpus, trials=1, **choices).run().save(tmp_path / name)
        assert read_observations([tmp_path / name]).scaled == scaled


def test_the_report_gives_the_exponent_of_the_best_rate_and_the_regret(corpus, tmp_path):
    results = run_sweep(corpus, widths=WIDTHS, trials=5)
    (budget,) = token_budgets(results)
    assert law(budget, "gpt+").exponent == pytest.approx(-0.5, abs=0.02)
    widest = budget.optima("gpt+")[-1]
    assert regret(budget, "gpt+", widest) == pytest.approx(0.1 * math.log(2) ** 2, abs=0.02)
    assert regret(budget, "angpt", budget.optima("angpt")[-1]) == pytest.approx(0, abs=1e-3)
    pytest.importorskip("matplotlib")
    results.save(tmp_path)
    assert read_observations([tmp_path]).scaled == {"gpt+", "angpt"}
    page, *charts = sweep_report.write(results, tmp_path)
    assert {path.name for path in charts} == {
        f"{name}.png" for name in ("loss-lr", "best-lr", "coordinates", "rotation", "logits")
    }
    assert re.search(r"GPT\+[^^]*\bwidth\^-0\.5", page.read_text())
    assert page.read_text().count("anGPT 0.012, GPT+ 0.012") == 3  # the rate of each chart of activations


def test_diverged_runs_are_saved_and_drawn(corpus, tmp_path):
    results = run_sweep(corpus, loss=lambda config: math.inf if config.lr > 0.01 else bowl(config), widths=WIDTHS[:2])
    results.save(tmp_path)
    assert Sweep.load(tmp_path) == results and any(math.isinf(run.loss) for run in results.runs)
    all_diverged = run_sweep(corpus, loss=lambda config: math.inf, widths=WIDTHS[:2])
    lead = sweep_report.lead(all_diverged)
    assert "anGPT" in lead and "GPT+" in lead and "width^" not in lead
    pytest.importorskip("matplotlib")
    for sweep_results in (results, all_diverged):
        assert sweep_report.write(sweep_results, tmp_path)


def test_a_sweep_of_one_size_is_summarized_by_its_best_settings(corpus):
    results = run_sweep(corpus, widths=WIDTHS[:1])
    lead = sweep_report.lead(results)
    best = min((run for run in results.runs if run.architecture == "angpt"), key=lambda run: run.loss)
    ((rate, loss),) = re.findall(r"anGPT: width \d+: learning rate (\S+), batch of 512 tokens, loss (\d\.\d+)", lead)
    assert best.lr / 2.2 < float(rate) < best.lr * 2.2
    assert best.loss - 0.05 < float(loss) <= best.loss  # between the rates that were tried


def test_sweeps_with_different_contexts_cannot_be_fitted_together(corpus, tmp_path):
    for context in (32, 64):
        settings = {"model": {**COMMON["model"], "context": context}}
        sweep_plan = plan(settings, 257, ["angpt"], ["nano"], batches=[512], tokens=[20_000], trials=1)
        search = Sweeper(sweep_plan, Dataset.open(corpus), FakeQueue(bowl), lambda words: None)
        (tmp_path / str(context)).mkdir()
        search.run().save(tmp_path / str(context))
    assert read_observations([tmp_path / "32"])
    with pytest.raises(DataError, match="32"):  # every run would count twice
        read_observations([tmp_path / "32", tmp_path / "32"])
    with pytest.raises(DataError) as error:
        read_observations([tmp_path / "32", tmp_path / "64"])
    assert str(tmp_path / "32") in str(error.value) and str(tmp_path / "64") in str(error.value)
    assert "context" in str(error.value).replace(str(tmp_path), "")


def test_activation_sizes_at_another_rate_or_batch_are_not_added_to_those_of_the_folder():
    def sweep(width, rate, name="angpt", batch=256):
        run = SweepRun(name, "nano", width, 1000, 2560, batch, rate, 0, 3.0, 1.0, 0.1, f"{name}-{width}")
        return Sweep({}, (run,), (CoordCheck(name, "nano", width, batch, rate, 0, (1.0, 1.0), 1.0, ()),))

    same = sweep(32, 1e-2).merged_with(sweep(16, 1e-2))
    assert [check.width for check in same.coord_check] == [16, 32] and len(same.runs) == 2
    other = sweep(32, 1e-2).merged_with(sweep(16, 1e-4))
    assert [check.width for check in other.coord_check] == [32] and len(other.runs) == 2
    assert [check.width for check in sweep(32, 1e-2).merged_with(sweep(16, 1e-2, batch=512)).coord_check] == [32]
    both = sweep(32, 1e-2).merged_with(sweep(32, 1e-4, "gpt+"))
    assert [check.architecture for check in both.coord_check] == ["gpt+", "angpt"]


def test_the_best_rate_of_the_smallest_size_at_the_edge_has_a_regret(corpus):
    """The best rate is exp(log(rate)), which may differ from the rate in its last digit."""
    for rate in (1e-3, 2e-3, 3e-3, 7e-3):
        rows = run_sweep(corpus, loss=lambda config: config.lr, lrs=[rate, 1.5 * rate], widths=WIDTHS)
        (budget,) = token_budgets(replace(rows, coord_check=()))
        assert regret(budget, "angpt", budget.optima("angpt")[-1]) == pytest.approx(0, abs=1e-9)


def test_sizes_of_one_width_have_no_law_over_width(corpus):
    results = run_sweep(corpus, widths=WIDTHS[:2])
    runs = tuple(replace(run, width=WIDTHS[0]) for run in results.runs)
    (budget,) = token_budgets(replace(results, runs=runs))
    assert law(budget, "angpt") is None


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        # By tokens per parameter, rounded to whole batches: the largest size was not run at the first.
        (
            {"nano": (5.02e6, 20e6), "32m": (160e6, 639e6), "62m": (1.2e9,)},
            [{"nano": 5.02e6, "32m": 160e6}, {"nano": 20e6, "32m": 639e6, "62m": 1.2e9}],
        ),
        ({"nano": (10e6, 11e6), "32m": (320e6, 352e6)}, [{"nano": 10e6, "32m": 320e6}, {"nano": 11e6, "32m": 352e6}]),
        ({"nano": (1e6, 4e6), "32m": (4e6,)}, [{"nano": 1e6}, {"nano": 4e6, "32m": 4e6}]),  # by tokens
    ],
)
def test_a_budget_has_the_sizes_that_were_run_at_it(lengths, expected):
    parameters = {"nano": 1_000_000, "32m": 32_000_000, "62m": 60_000_000}
    runs = tuple(
        SweepRun("angpt", size, 128, parameters[size], int(count), 256, 0.01, 0, 3.0, 1.0, 0.1, f"{size}-{count}")
        for size, counts in lengths.items()
        for count in counts
    )
    budgets = token_budgets(Sweep({}, runs))
    names = {count: name for name, count in parameters.items()}
    assert [{names[row.parameters]: row.tokens for row in budget.rows} for budget in budgets] == expected
    assert len({budget.slug for budget in budgets}) == len(budgets)


def test_a_damaged_sweep_is_refused(corpus, tmp_path):
    sweeper(corpus).run().save(tmp_path)
    content = json.loads((tmp_path / "sweep.json").read_text())
    first = content["runs"][0]
    for entry in ({**first, "lr": None}, {**first, "batch": 0}, {**first, "loss": "low"}, {**first, "folder": "../x"}):
        (tmp_path / "sweep.json").write_text(json.dumps({**content, "runs": [entry]}))
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_observations([tmp_path])
    for entry in ({"settings": 5}, {"settings": None}, {"commands_before": 5}):
        (tmp_path / "sweep.json").write_text(json.dumps({**content, "setup": {**content["setup"], **entry}}))
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_observations([tmp_path])
    for text in ("[]", "{", json.dumps({**content, "runs": []}), json.dumps({**content, "version": 1})):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_observations([tmp_path])


@pytest.fixture(scope="module")
def small_sweep(corpus, in_process, tmp_path_factory):
    """Folder and command of a sweep with real runs."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    words = ["sweep", "--data", str(corpus), "--out", str(folder), *TINY, "--lrs", "1e-3", "1e-2", *OPTIONS]
    assert main(words) == 0
    return folder, words


def test_a_sweep_writes_runs_and_a_report_and_repeats_nothing(small_sweep, capsys, monkeypatch):
    folder, words = small_sweep
    results = Sweep.load(folder)
    assert [(run.width, run.lr) for run in results.runs] == [(16, 1e-3), (16, 1e-2)]
    assert [(check.width, check.step) for check in results.coord_check] == [(16, 0), (16, STEPS)]
    start, end = results.coord_check
    assert start.rotation_deg == () and len(end.rotation_deg) == len(end.stream)
    assert all(1 < angle < 120 for angle in end.rotation_deg)
    assert start.stream[0] == pytest.approx(16**-0.5, rel=0.01)  # norm 1
    assert (folder / "report.html").stat().st_size > 10_000
    assert {saved_config(path.parent).recipe for path in (folder / "runs").glob("*/config.yaml")} == {"paper"}
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    monkeypatch.setattr("antransformer.sweeps.sweep.coord_check", None)  # not called again
    assert main(words) == 0 and Sweep.load(folder).coord_check == results.coord_check
    out = capsys.readouterr().out
    assert all(run.folder in out for run in results.runs) and not re.search(r"nano-w16(?!-)", out)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert main(["fit", str(folder)]) == 2
    errors = capsys.readouterr().err
    assert "angpt" in errors and errors.count("\n") == 1


def test_activation_sizes_are_measured_again_only_under_other_conditions(corpus, monkeypatch):
    measured = []

    def measure(config, dataset):
        name, width = config.model.architecture, config.model.width
        measured.append((name, width))
        return [CoordCheck(name, config.preset, width, config.batch_tokens, config.lr, 0, (1.0,), 1.0, ())]

    monkeypatch.setattr("antransformer.sweeps.sweep.coord_check", measure)
    first = sweeper(corpus, widths=WIDTHS[:1]).run()
    assert measured == [("angpt", WIDTHS[0]), ("gpt+", WIDTHS[0])]
    assert sweeper(corpus, widths=WIDTHS[:1]).run(first).coord_check == first.coord_check and len(measured) == 2
    more = sweeper(corpus, widths=WIDTHS[:2]).run(first)
    assert measured[2:] == [("angpt", WIDTHS[1]), ("gpt+", WIDTHS[1])] and len(more.coord_check) == 4
    for change in ({"lrs": [0.5]}, {"batches": [256]}, {"sizes": ["pico"]}):
        measured.clear()
        sweeper(corpus, **{"widths": WIDTHS[:1], **change}).run(first)
        assert len(measured) == 2


def test_a_sweep_with_other_batches_and_rates_adds_to_the_folder(small_sweep, tmp_path, capsys, monkeypatch):
    folder, words = tmp_path / "out", list(small_sweep[1])
    shutil.copytree(small_sweep[0], folder)
    earlier = Sweep.load(folder)
    replace(earlier, setup={**earlier.setup, "command": "antransformer sweep earlier"}).save(folder)
    monkeypatch.setattr(sys, "argv", ["antransformer", *words])
    words[words.index("--out") + 1] = str(folder)
    for option, value in (("--lrs", "3e-3"), ("--batch-tokens", "128"), ("--tokens", "768")):
        words[words.index(option) + 1] = value
    assert main(words) == 0
    before, _, _ = capsys.readouterr().out.partition("\n[")  # the first line of progress
    assert re.search(r"\b2\b.*\b0\.0M\b", before)
    results = Sweep.load(folder)
    assert [(run.batch, run.lr) for run in results.runs] == [(256, 1e-3), (256, 1e-2), (128, 3e-3), (128, 1e-2)]
    assert [(check.width, check.step) for check in results.coord_check] == [(16, 0), (16, STEPS)]
    page = (folder / "report.html").read_text()
    assert all(run.folder in page for run in results.runs)
    setup = Sweep.load(folder).setup
    assert setup["command"] == shlex.join(sys.argv) and setup["commands_before"] == ["antransformer sweep earlier"]
    assert main([*words, "--beta2=0.9"]) == 2
    errors = capsys.readouterr().err
    assert all(word in errors for word in (str(folder), "beta2", "0.9", "--out"))


def test_a_folder_with_other_data_or_settings_is_refused(small_sweep, corpus, capsys, monkeypatch):
    folder, words = small_sweep
    assert main([*words, "--model.layers=2"]) == 2
    errors = capsys.readouterr().err
    assert str(folder) in errors and re.search(r"model\.layers\b\D*1\b\D*2\b", errors)
    monkeypatch.setattr(Dataset, "digest", property(lambda self: "0" * 64))
    for more in ([], ["--widths", "32"]):  # the same runs, and new ones
        assert main([*words, *more]) == 2
        errors = capsys.readouterr().err
        assert f"{folder} " in errors and str(corpus) in errors and errors.count("\n") == 1
    (folder / "sweep.json").rename(folder / "sweep.json.away")  # as if killed before its end
    assert main(words) == 2
    (folder / "sweep.json.away").rename(folder / "sweep.json")
    errors = capsys.readouterr().err
    assert str(folder / "runs/angpt-nano-w16") in errors and str(corpus) in errors and errors.count("\n") == 1


def test_a_long_sweep_needs_yes(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "HOURS_WITHOUT_YES", 0.0)
    words = ["sweep", "--data", str(corpus), "--out", str(tmp_path / "out"), *TINY, *OPTIONS]
    assert main(words) == 2
    captured = capsys.readouterr()
    timed, expected = captured.out.splitlines()
    assert all(word in timed for word in ("3", "angpt", "nano-w16"))
    assert re.search(r"\b5\b.*\b0\.0M\b.*\b9\b", expected)  # runs without and with all extensions
    assert "--yes" in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--architectures", "angtp"], ["'angtp'", "angpt"]),
        (["--sizes", "tiny"], ["'tiny'"]),
        (["--widths", "64", "64"], ["widths", "64 64"]),
        (["--widths", "64", "--sizes", "pico", "nano"], ["widths", "sizes"]),
        (["--widths", "40"], ["width", "40", "head_dim", "16"]),
        (["--widths", "wide"], ["widths", "'wide'"]),
        (["--batch-tokens", "0"], ["batch_tokens", " 0"]),
        (["--batch-tokens", "1M", "--tokens", "1K"], ["nano", "1,000", "batch_tokens"]),
        (["--tokens", "1K", "1010", "--batch-tokens", "256"], ["nano", "256"]),
        (["--tokens", "1K", "--tokens-per-param", "5"], ["tokens ", "tokens_per_param"]),
        (["--lrs", "fast"], ["lrs", "'fast'"]),
        (["--lrs", "1e-3", "--lr-trials", "3"], ["lr_trials", "lrs"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--devices", "tpu"], ["'tpu'"]),
        (["--lr", "1"], ["--lr"]),
    ],
)
def test_a_usage_error_gives_one_line_and_status_2(arguments, expected, corpus, capsys, tmp_path):
    assert main(["sweep", "--data", str(corpus), "--out", str(tmp_path / "out"), *OPTIONS, *arguments]) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err for word in expected), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_comparison_is_refused(corpus, tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["sweep", "--data", str(corpus), "--out", str(tmp_path), *OPTIONS]) == 2
    errors = capsys.readouterr().err
    assert str(tmp_path) in errors and "--out" in errors and errors.count("\n") == 1


def test_values_that_round_to_the_same_are_refused(corpus):
    assert set(sweeper(corpus, lrs=[1.0003e-3, 1.0004e-3]).plan.grids.values()) == {(1.0003e-3, 1.0004e-3)}
    with pytest.raises(ConfigError, match=r"lrs .*0\.0010000003 0\.0010000004"):
        check_choices(["angpt"], ["nano"], [], [1.0000003e-3, 1.0000004e-3])
    with pytest.raises(ConfigError, match=r"batch_tokens .*512 513"):
        sweeper(corpus, batches=[512, 513])
