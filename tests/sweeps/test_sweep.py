"""The grid search: what is tried, what is left, what fit reads; and from the command line, with real runs."""

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
from antransformer.results.observations import Observations, read_observations, swept
from antransformer.results.sweep import Sweep
from antransformer.runs.queue import RunResult
from antransformer.runs.search import EXTENSIONS
from antransformer.scaling.fits import fit
from antransformer.sweeps import report as sweep_report
from antransformer.sweeps.charts import law, regret, token_budgets
from antransformer.sweeps.sweep import LR_RATIO, Sweeper, plan
from antransformer.training.config import resolve_config
from helpers.small import SMALL

COMMON = {"model": {name: value for name, value in SMALL.items() if name != "width"}}
WIDTHS = (32, 64, 96, 128)
OPTIONS = ["--model.layers=1", "--model.context=32", "--model.head-dim=16", "--eval-tokens=1024", "--workers=2"]
TINY = ["--widths", "16", "--batch-tokens", "256", "--tokens", "1K"]


class FakeQueue:
    """Runs jobs by a formula; ``known`` are those that were done before."""

    devices = ("cpu",)

    def __init__(self, loss):
        self.loss, self.known = loss, {}

    def run(self, jobs):
        self.known |= {job.name: self.outcome(job) for job in jobs}
        return self.known

    def outcome(self, job):
        parameters = job.config.model.width * 1000
        return RunResult(job.name, self.loss(job.config), 1.0, 0.1, parameters, "a machine")

    def finished(self, job):
        return self.known.get(job.name)


def best_lr(config):
    """The best rate of GPT+ falls as the width rises."""
    return 1e-2 * ((config.model.width / 64) ** -0.5 if config.model.architecture == "gpt+" else 1.0)


def bowl(config):
    off = math.log(config.lr / best_lr(config)) ** 2 + math.log(config.batch_tokens / 512) ** 2
    return 3 + 0.1 * off + 10 / config.model.width + 100 / config.tokens


def sweeper(corpus, loss=bowl, **choices):
    dataset = Dataset.open(corpus)
    given = {"architectures": ["angpt", "gpt+"], "sizes": ["nano"], "tokens": [20_000], "batches": [512], "trials": 3}
    planned = plan(COMMON, dataset.vocab_size, **{**given, **choices})
    return Sweeper(planned, dataset, FakeQueue(loss), lambda words: None)


def found(corpus, **choices):
    """A sweep without the coordinates of real models."""
    made = sweeper(corpus, **choices)
    made.coordinates = lambda: tuple(
        CoordCheck(
            name,
            width,
            step,
            (width**-0.5, 1.0, math.inf if step else 2.0),
            1.0,
            (30.0, 60.0, math.inf) if step else (),
        )
        for name in ("angpt", "gpt+")
        for width in WIDTHS
        for step in (0, STEPS)
    )
    return made.run()


def test_rates_are_a_third_of_a_decade_apart_and_go_on_until_the_best_lies_inside(corpus):
    made = sweeper(corpus)
    results = made.run()
    rates = [run.lr for run in results.runs if run.architecture == "angpt"]
    assert rates == [5.57e-3, 1.2e-2, 2.59e-2] and rates[1] / rates[0] == pytest.approx(LR_RATIO, rel=0.01)
    far = sweeper(corpus, loss=lambda config: abs(math.log(config.lr / 0.08)), architectures=["angpt"]).run()
    assert [run.lr for run in far.runs] == [5.57e-3, 1.2e-2, 2.59e-2, 5.58e-2, 0.12, 0.259][: len(far.runs)]
    assert len(far.runs) in (5, 6)
    never = sweeper(corpus, loss=lambda config: 1 / config.lr, architectures=["angpt"]).run()
    assert len(never.runs) == 3 + EXTENSIONS


def test_rates_that_were_named_are_the_ones_that_are_tried(corpus):
    results = sweeper(corpus, loss=lambda config: 1 / config.lr, lrs=[1e-3, 2e-3], seeds=2).run()
    tried = [(run.lr, run.seed) for run in results.runs if run.architecture == "angpt"]
    assert tried == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]


def test_sizes_have_the_longest_context_among_them_and_whole_batches_of_the_largest(corpus):
    dataset = Dataset.open(corpus)
    planned = plan(
        {}, dataset.vocab_size, ["gpt+", "angpt"], ["pico", "nano"], batches=[1024, 2048], ratios=[1, 2], trials=2
    )
    made = Sweeper(planned, dataset, FakeQueue(bowl), lambda words: None)
    cells = list(planned.grids)
    assert len(cells) == 2 * 2 * 2 * 2
    for cell in cells:
        config = made.config(cell, 1e-3, 0)
        assert config.model.context == 256 and config.tokens % 2048 == 0 and config.steps * cell.batch == cell.tokens
    # The same tokens for every architecture, although its parameters are a few more.
    assert {cell.tokens for cell in cells if cell.architecture == "gpt+"} == {
        cell.tokens for cell in cells if cell.architecture == "angpt"
    }


def test_widths_share_batch_and_rates(corpus):
    made = sweeper(corpus, widths=(32, 512), batches=())
    assert {cell.batch for cell in made.plan.grids} == {2048}
    assert len({grid for cell, grid in made.plan.grids.items() if cell.architecture == "gpt+"}) == 1
    assert {made.config(cell, 1e-3, 0).model.width for cell in made.plan.grids} == {32, 512}


def test_widths_have_the_rule_of_the_preset_or_that_which_is_given():
    def rules(preset, **settings):
        names, batches = ["angpt", "gpt+"], [2048]
        planned = plan(settings, 257, names, [preset], widths=(64, 512), batches=batches, tokens=[20_000])
        return {(cell.architecture, own["lr_width"]) for cell, own in planned.settings.items()}

    assert rules("nano") == {("angpt", 128), ("gpt+", 128)}
    assert rules("32m") == {("angpt", 0), ("gpt+", 0)}  # one rate for all, also where a width lies below 30M
    assert rules("nano", lr_width=0) == {("angpt", 0), ("gpt+", 0)}


def test_by_its_rule_a_step_turns_the_stream_as_far_at_four_times_the_width(corpus):
    def turned(width, **rule):
        model = {**COMMON["model"], "width": width}
        settings = {"model": model, "batch_tokens": 512, "tokens": 5120, "data": str(corpus), "lr": 1e-2, **rule}
        config = resolve_config(settings, 257)
        return np.array(coord_check(config, Dataset.open(corpus))[1].rotation_deg)

    narrow = turned(32, lr_width=32)
    assert turned(128, lr_width=32) == pytest.approx(narrow, rel=0.1)
    assert turned(128, lr_width=0)[0] > 1.3 * narrow[0]


def test_what_is_done_is_not_counted_again(corpus):
    made = sweeper(corpus, architectures=["angpt"], seeds=2)
    (cell,) = made.plan.grids
    assert made.missing(cell) == (6, 6 + 2 * EXTENSIONS)
    made.queue.run(made.jobs(cell, 1.2e-2))
    assert made.missing(cell) == (4, 4 + 2 * EXTENSIONS)
    made.run()
    assert made.missing(cell) == (0, 0)


def test_fit_reads_a_sweep_and_finds_what_was_put_in(corpus, tmp_path):
    results = found(corpus, widths=WIDTHS, batches=[256, 512, 1024], tokens=[20_480, 40_960])
    results.save(tmp_path)
    assert Sweep.load(tmp_path) == results
    read = read_observations([tmp_path])
    assert read.searches == read.runs == tuple(swept(results))
    laws = {it.name: it.laws for it in fit(Observations(read.searches, read.runs))}
    assert laws["gpt+"]["lr"].exponent == pytest.approx(-0.5, abs=0.02)
    assert laws["angpt"]["lr"].exponent == pytest.approx(0.0, abs=0.02)


def test_the_report_says_whether_the_best_rate_moves(corpus, tmp_path):
    results = found(corpus, widths=WIDTHS, trials=5)
    (level,) = token_budgets(results)
    assert law(level, "gpt+").exponent == pytest.approx(-0.5, abs=0.02)
    widest = level.optima("gpt+")[-1]
    assert regret(level, "gpt+", widest) == pytest.approx(0.1 * math.log(2) ** 2, abs=0.02)
    assert regret(level, "angpt", level.optima("angpt")[-1]) == pytest.approx(0, abs=1e-3)
    pytest.importorskip("matplotlib")
    page, *pictures = sweep_report.write(results, tmp_path)
    assert {path.name for path in pictures} == {
        f"{name}.png" for name in ("loss-lr", "best-lr", "coordinates", "rotation", "logits")
    }
    assert re.search(r"GPT\+[^^]*\bwidth\^-0\.5", page.read_text())


def test_diverged_runs_are_kept_and_drawn(corpus, tmp_path):
    results = found(corpus, loss=lambda config: math.inf if config.lr > 0.01 else bowl(config), widths=WIDTHS[:2])
    results.save(tmp_path)
    assert Sweep.load(tmp_path) == results and any(math.isinf(run.loss) for run in results.runs)
    nothing = found(corpus, loss=lambda config: math.inf, widths=WIDTHS[:2])
    lead = sweep_report.lead(nothing)
    assert "anGPT" in lead and "GPT+" in lead and "width^" not in lead
    pytest.importorskip("matplotlib")
    for each in (results, nothing):
        assert sweep_report.write(each, tmp_path)


def test_sweeps_of_other_contexts_are_not_fitted_together(corpus, tmp_path):
    for context in (32, 64):
        given = {"model": {**COMMON["model"], "context": context}}
        planned = plan(given, 257, ["angpt"], ["nano"], batches=[512], tokens=[20_000], trials=1)
        made = Sweeper(planned, Dataset.open(corpus), FakeQueue(bowl), lambda words: None)
        (tmp_path / str(context)).mkdir()
        made.run().save(tmp_path / str(context))
    assert read_observations([tmp_path / "32", tmp_path / "32"])
    with pytest.raises(DataError) as error:
        read_observations([tmp_path / "32", tmp_path / "64"])
    assert str(tmp_path / "32") in str(error.value) and str(tmp_path / "64") in str(error.value)
    assert "context" in str(error.value).replace(str(tmp_path), "")


def test_a_damaged_sweep_is_refused_in_one_line(corpus, tmp_path):
    sweeper(corpus).run().save(tmp_path)
    whole = json.loads((tmp_path / "sweep.json").read_text())
    first = whole["runs"][0]
    for entry in ({**first, "lr": None}, {**first, "batch": 0}, {**first, "loss": "low"}, {**first, "folder": "../x"}):
        (tmp_path / "sweep.json").write_text(json.dumps({**whole, "runs": [entry]}))
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_observations([tmp_path])
    for entry in ({"settings": 5}, {"settings": None}, {"commands_before": 5}):
        (tmp_path / "sweep.json").write_text(json.dumps({**whole, "setup": {**whole["setup"], **entry}}))
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_observations([tmp_path])
    for content in ("[]", "{", json.dumps({**whole, "runs": []}), json.dumps({**whole, "version": 1})):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_observations([tmp_path])


@pytest.fixture(scope="module")
def small_sweep(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    words = ["sweep", "--data", str(corpus), "--out", str(folder), *TINY, "--lrs", "1e-3", "1e-2", *OPTIONS]
    assert main(words) == 0
    return folder, words


def test_a_sweep_leaves_runs_a_page_and_what_fit_reads(small_sweep, capsys):
    folder, words = small_sweep
    results = Sweep.load(folder)
    assert [(run.width, run.lr) for run in results.runs] == [(16, 1e-3), (16, 1e-2)]
    assert [(it.width, it.step) for it in results.coordinates] == [(16, 0), (16, STEPS)]
    start, end = results.coordinates
    assert (
        start.rotation_deg == ()
        and len(end.rotation_deg) == len(end.stream)
        and all(1 < it < 120 for it in end.rotation_deg)
    )
    assert start.stream[0] == pytest.approx(16**-0.5, rel=0.01)  # a unit norm
    assert (folder / "report.html").stat().st_size > 10_000
    files = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(run.folder in out for run in results.runs) and not re.search(r"nano-w16(?!-)", out)  # no size was timed
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert main(["fit", str(folder)]) == 2
    errors = capsys.readouterr().err
    assert "angpt" in errors and errors.count("\n") == 1


def test_other_batches_and_rates_add_to_what_the_folder_holds(small_sweep, tmp_path, capsys, monkeypatch):
    folder, words = tmp_path / "out", list(small_sweep[1])
    shutil.copytree(small_sweep[0], folder)
    earlier = Sweep.load(folder)
    replace(earlier, setup={**earlier.setup, "command": "antransformer sweep of before"}).save(folder)
    monkeypatch.setattr(sys, "argv", ["antransformer", *words])
    words[words.index("--out") + 1] = str(folder)
    for option, value in (("--lrs", "3e-3"), ("--batch-tokens", "128"), ("--tokens", "768")):
        words[words.index(option) + 1] = value
    assert main(words) == 0
    before, _, _ = capsys.readouterr().out.partition("\n[")  # the first line of progress
    assert re.search(r"\b2\b.*\b0\.0M\b", before)
    results = Sweep.load(folder)
    assert [(run.batch, run.lr) for run in results.runs] == [(256, 1e-3), (256, 1e-2), (128, 3e-3), (128, 1e-2)]
    assert [(it.width, it.step) for it in results.coordinates] == [(16, 0), (16, STEPS)]
    page = (folder / "report.html").read_text()
    assert all(run.folder in page for run in results.runs)
    setup = Sweep.load(folder).setup
    assert setup["command"] == shlex.join(sys.argv) and setup["commands_before"] == ["antransformer sweep of before"]
    assert main([*words, "--beta2=0.9"]) == 2
    errors = capsys.readouterr().err
    assert all(word in errors for word in (str(folder), "beta2", "0.9", "--out"))


def test_a_sweep_of_other_data_or_settings_is_refused(small_sweep, corpus, capsys, monkeypatch):
    folder, words = small_sweep
    assert main([*words, "--model.layers=2"]) == 2
    errors = capsys.readouterr().err
    assert str(folder) in errors and re.search(r"model\.layers\b\D*1\b\D*2\b", errors)
    monkeypatch.setattr(Dataset, "digest", property(lambda self: "0" * 64))
    for more in ([], ["--widths", "32"]):  # the same runs, and others, of which none would be found done
        assert main([*words, *more]) == 2
        errors = capsys.readouterr().err
        assert f"{folder} " in errors and str(corpus) in errors and errors.count("\n") == 1
    (folder / "sweep.json").rename(folder / "sweep.json.away")  # killed before its end
    assert main(words) == 2
    (folder / "sweep.json.away").rename(folder / "sweep.json")
    errors = capsys.readouterr().err
    assert str(folder / "runs/angpt-nano-w16") in errors and str(corpus) in errors and errors.count("\n") == 1


def test_past_an_hour_it_asks_first(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "UNASKED_HOURS", 0.0)
    words = ["sweep", "--data", str(corpus), "--out", str(tmp_path / "out"), *TINY, *OPTIONS]
    assert main(words) == 2
    captured = capsys.readouterr()
    timed, expected = captured.out.splitlines()
    assert all(word in timed for word in ("3", "angpt", "nano-w16"))
    assert re.search(r"\b5\b.*\b0\.0M\b.*\b9\b", expected)  # runs without and with all extensions
    assert "--yes" in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--architectures", "angtp"], ["'angtp'", "angpt"]),
        (["--sizes", "tiny"], ["'tiny'"]),
        (["--widths", "64", "64"], ["--widths", "64 64"]),
        (["--widths", "64", "--sizes", "pico", "nano"], ["--widths", "--sizes"]),
        (["--widths", "40"], ["width", "40", "head_dim", "16"]),
        (["--widths", "wide"], ["--widths", "'wide'"]),
        (["--batch-tokens", "0"], ["--batch-tokens", " 0"]),
        (["--batch-tokens", "1M", "--tokens", "1K"], ["nano", "1,000", "--batch-tokens"]),
        (["--tokens", "1K", "1010", "--batch-tokens", "256"], ["nano", "256"]),
        (["--tokens", "1K", "--tokens-per-param", "5"], ["--tokens ", "--tokens-per-param"]),
        (["--lrs", "fast"], ["--lrs", "'fast'"]),
        (["--lrs", "1e-3", "--lr-trials", "3"], ["--lr-trials", "--lrs"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--devices", "tpu"], ["'tpu'"]),
        (["--lr", "1"], ["--lr"]),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, named, corpus, capsys, tmp_path):
    assert main(["sweep", "--data", str(corpus), "--out", str(tmp_path / "out"), *OPTIONS, *arguments]) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err for word in named), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_comparison_is_refused(corpus, tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["sweep", "--data", str(corpus), "--out", str(tmp_path), *OPTIONS]) == 2
    errors = capsys.readouterr().err
    assert str(tmp_path) in errors and "--out" in errors and errors.count("\n") == 1


def test_the_plan_refuses_what_comes_to_the_same(corpus):
    assert set(sweeper(corpus, lrs=[1.0003e-3, 1.0004e-3]).plan.grids.values()) == {(1.0003e-3, 1.0004e-3)}
    with pytest.raises(ConfigError, match=r"--lrs .*0\.0010000003 0\.0010000004"):
        sweeper(corpus, lrs=[1.0000003e-3, 1.0000004e-3])
    with pytest.raises(ConfigError, match=r"--batch-tokens .*512 513"):
        sweeper(corpus, batches=[512, 513])
