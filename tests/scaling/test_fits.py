"""antransformer fit: from result folders and CSV tables to laws, JSON and charts."""

import csv
import errno
import itertools
import json
import math
import os
import re
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import antransformer
from antransformer.cli import main
from antransformer.errors import ConfigError, DataError
from antransformer.results.comparison import ChosenSettings, Results, Run, Trial, Variant
from antransformer.results.observations import BestSettings, Observation, Observations, read_observations
from antransformer.scaling.charts import charts
from antransformer.scaling.fits import LAWS, fit, fit_optima
from antransformer.training.config_files import format_settings
from helpers.messages import mentions

HEADER = "architecture,parameters,tokens,batch,lr,loss"
OPTIMA = """architecture,parameters,batch,lr
angpt,32.10e6,31,3.4e-3
angpt,62.28e6,39,2.1e-3
angpt,127.08e6,120,2.6e-3
gpt+,32.10e6,25,1.1e-2
gpt+,62.28e6,31,5.3e-3
gpt+,127.08e6,134,7.7e-3
"""
TRAINED = {
    "optimizer": "adam",
    "schedule": "cosine",
    "min_lr_ratio": 0.01,
    "ema": 0.0,
    "lr_width": 0,
    "lr_horizon": 0,
    "horizon_exponent": 0.0,
    "precision": "float32",
    "document_mask": False,
    "model": {"width": 64},
}
SIZES = (30e6, 60e6, 120e6, 240e6)
RATIOS = (1.25, 5, 20, 80)
BATCH, LR = (2.25e-3, 0.984), (0.065, -0.178)


def loss_at(n, d, batch, lr):
    """Loss with a bowl around the best batch and learning rate, which follow BATCH and LR."""
    best_batch, best_lr = BATCH[0] * n ** BATCH[1], LR[0] * n ** LR[1]
    off = math.log(lr / best_lr) - 0.5 * math.log(batch / best_batch)
    return 1.9 + 300 / n**0.33 + 500 / d**0.3 + 0.02 * math.log(batch / best_batch) ** 2 + 0.1 * off**2


def grid_search(architecture="angpt", sizes=SIZES):
    """Runs of a grid search at 20 tokens per parameter, and runs at its best settings with other token counts."""
    rows = []
    for n in sizes:
        best = round(BATCH[0] * n ** BATCH[1]), LR[0] * n ** LR[1]
        for ratio in RATIOS:
            grid = (
                [(2048 * 2**k, 3e-4 * 10 ** (j / 3)) for k in range(3, 10) for j in range(6)] if ratio == 20 else [best]
            )
            rows += [
                Observation(architecture, n, ratio * n, batch, lr, loss_at(n, ratio * n, batch, lr))
                for batch, lr in grid
            ]
    return rows


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split(","))
        writer.writerows([row.architecture, row.parameters, row.tokens, row.batch, row.lr, row.loss] for row in rows)
    return path


def experiment(size, best_lr, kind="compare", searches=(2_000_000,), **setup):
    """Results of a comparison at one size, whose searches find the same learning rate."""
    variants = []
    for name, shift in (("gpt+", 0.2), ("angpt", 0.0)):
        trials = [
            Trial("lr", rate, 3.5 + shift + 0.1 * math.log(rate / best_lr) ** 2, f"{name}-{rate:g}", search)
            for search in searches
            for rate in best_lr * 2.0 ** np.arange(-2, 3)
        ]
        runs = [
            Run(
                tokens,
                seed,
                2 + shift + 300 / size**0.3 + 400 / tokens**0.3 + 0.02 * (seed - 1.5),
                1.0,
                0.1,
                f"{tokens}-{seed}",
            )
            for tokens in (1_000_000, 2_000_000, 4_000_000)
            for seed in (1, 2)
        ]
        hyperparameter = Trial("weight_decay", 0.1, 0.1, f"{name}-hyperparameter", 2_000_000)
        settings = {"architecture": name, "lr": best_lr}
        chosen = tuple(ChosenSettings(tokens, 2_000_000, settings) for tokens in (1_000_000, 2_000_000, 4_000_000))
        variants.append(Variant(name, settings, int(size), (*trials, hyperparameter), tuple(runs), chosen))
    setup = {"batch_tokens": 2048, "data_digest": "abc", "validation_tokens": 4096, **setup}
    return Results(kind, setup, (1_000_000, 2_000_000, 4_000_000), (1, 2), tuple(variants))


def write_folder(path, *args, trained=None, **kwargs):
    """Write the results of a comparison, and the config of its runs if ``trained`` gives their settings."""
    path.mkdir()
    results = experiment(*args, **kwargs)
    results.save(path)
    if trained is not None:
        for folder in {run.folder for variant in results.variants for run in variant.runs}:
            (path / "runs" / folder).mkdir(parents=True)
            config = {**TRAINED, **trained, "model": {**TRAINED["model"], **trained.get("model", {})}}
            (path / "runs" / folder / "config.yaml").write_text(format_settings(config))
    return path


def test_known_optima_give_laws_of_batch_and_learning_rate(tmp_path, capsys):
    source, target = tmp_path / "optima.csv", tmp_path / "laws.json"
    source.write_text(OPTIMA)
    assert main(["fit", "--optima", str(source), "--json", str(target), "--out", str(tmp_path / "charts")]) == 0
    laws = json.loads(target.read_text())
    assert list(laws) == ["angpt", "gpt+"]
    for architecture in laws.values():
        for name in ("batch", "lr"):
            assert {"coefficient", "exponent", "r2"} <= architecture[name].keys()
    n, batch = np.log([32.10e6, 62.28e6, 127.08e6]), np.log([31, 39, 120])
    assert laws["angpt"]["batch"]["exponent"] == pytest.approx(np.polyfit(n, batch, 1)[0])
    out = capsys.readouterr().out
    assert re.search(r"\bbatch = .* 3 *\n", out) and re.search(r"^- .*\bbatch\b.*\b3\b", out, re.MULTILINE)
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {"best-batch.png", "best-lr.png"}


def test_all_laws_are_recovered_from_a_table(tmp_path, capsys):
    source, target = write_table(tmp_path / "runs.csv", grid_search()), tmp_path / "laws.json"
    assert main(["fit", str(source), "--json", str(target), "--out", str(tmp_path / "charts")]) == 0
    laws = json.loads(target.read_text())["angpt"]
    assert laws["batch"]["exponent"] == pytest.approx(BATCH[1], abs=0.06)
    assert laws["lr"]["exponent"] == pytest.approx(LR[1], abs=0.06)
    assert laws["surface"]["alpha"] == pytest.approx(0.33, abs=0.01)
    assert laws["surface"]["E"] == pytest.approx(1.9, abs=0.02)
    assert len(laws["optima"]) == 4 and all(optimum["best"]["lr_bracketed"] for optimum in laws["optima"])
    assert laws["loss"]["exponent"] < 0 and laws["frontier"][0].keys() >= {"compute", "bracketed"}
    charts_written = {path.name for path in (tmp_path / "charts").iterdir()}
    assert charts_written == {
        f"{name}.png" for name in ("best-batch", "best-lr", "loss-compute", "best-size", "best-tokens", "search-angpt")
    }
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "charts").iterdir())
    out = capsys.readouterr().out
    assert re.search(r"lr = \S+ N\^-0\.1\d+ ", out) and "alpha = 0.33" in out


def test_tick_labels_of_three_panels_do_not_overlap():
    rows = grid_search()
    (chart,) = (chart for chart in charts(fit(Observations(rows, rows)), rows) if chart.name == "search-angpt")
    chart.figure.draw_without_rendering()
    assert len(chart.figure.axes) == 3
    for axes in chart.figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        inside = [box for box in boxes if axes.bbox.x0 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1]
        assert len(inside) >= 2 and all(left.x1 < right.x0 for left, right in pairwise(inside))


def test_comparison_folders_give_searches_and_runs(tmp_path):
    paths = [write_folder(tmp_path / str(size), size, lr) for size, lr in ((2_000_000, 4e-3), (8_000_000, 2e-3))]
    observed = read_observations(paths)
    assert len(observed.searches) == 2 * 2 * 5  # without the trials of weight_decay
    assert len(observed.runs) == 2 * 2 * 6
    assert {(row.tokens, row.batch) for row in observed.searches} == {(2e6, 2048)}
    fits = {fitted.name: fitted for fitted in fit(observed)}
    angpt = fits["angpt"]
    assert [optimum.best.lr for optimum in angpt.optima] == pytest.approx([4e-3, 2e-3], rel=0.01)
    assert angpt.laws["lr"].exponent == pytest.approx(-0.5, abs=0.01) and "batch" not in angpt.laws
    assert angpt.laws["lr"].delta["exponent"] == (-math.inf, math.inf)
    assert len(angpt.runs) == 6  # averaged over seeds
    assert fits["gpt+"].runs[0].loss - angpt.runs[0].loss == pytest.approx(0.2)
    # No law of the batch, two points for the law of the learning rate, different tokens per parameter, no surface.
    for words in (r"\bbatch\b", rf"^{LAWS['lr'][0]}", r"\b0\.25\b.*\b1\b", r"L\(N, D\).*\b6\b.*\b2\b.*\b3\b"):
        assert any(re.search(words, note) for note in angpt.notes), words


def test_every_search_of_a_comparison_gives_an_optimum_at_its_budget(tmp_path):
    searches = (1_000_000, 4_000_000)
    sizes = ((2_000_000, 4e-3), (8_000_000, 2e-3))
    paths = [write_folder(tmp_path / str(size), size, lr, searches=searches) for size, lr in sizes]
    angpt = {fitted.name: fitted for fitted in fit(read_observations(paths))}["angpt"]
    assert [(item.parameters, item.tokens) for item in angpt.optima] == [(n, d) for n, _ in sizes for d in searches]
    assert [item.best.lr for item in angpt.optima] == pytest.approx([4e-3, 4e-3, 2e-3, 2e-3], rel=0.01)


def test_trials_of_separate_rates_give_no_law_of_the_learning_rate(tmp_path):
    """With separate rates ``lr`` is the rate of the blocks, or of the vectors with Muon."""
    paths = []
    for size, lr in ((2_000_000, 4e-3), (8_000_000, 2e-3)):
        results = experiment(size, lr)
        baseline, method = results.variants
        added = tuple(replace(trial, setting="embed_lr") for trial in method.trials_of("lr", 2_000_000))
        paths.append(tmp_path / str(size))
        paths[-1].mkdir()
        replace(results, variants=(baseline, replace(method, trials=method.trials + added))).save(paths[-1])
    observed = read_observations(paths)
    assert observed.separate == {"angpt"} and {row.architecture for row in observed.searches} == {"gpt+"}
    fits = {fitted.name: fitted for fitted in fit(observed)}
    assert "lr" in fits["gpt+"].laws and "lr" not in fits["angpt"].laws and fits["angpt"].horizon is None
    assert len(fits["angpt"].runs) == len(fits["gpt+"].runs) == 6
    assert any(note.startswith(LAWS["lr"][0]) for note in fits["angpt"].notes)


def test_rates_that_are_scaled_to_each_width_give_no_law():
    rows = grid_search()
    assert "lr" in fit(Observations(rows, rows))[0].laws
    (fitted,) = fit(Observations(rows, rows, scaled=frozenset({"angpt"})))
    assert "lr" not in fitted.laws and any(note.startswith(LAWS["lr"][0]) for note in fitted.notes)


def test_a_variant_counts_under_its_architecture_with_its_own_batch(tmp_path):
    results = experiment(2_000_000, 4e-3)
    renamed = [
        replace(variant, name=f"{variant.name} 64K", settings={**variant.settings, "batch_tokens": 65_536})
        for variant in results.variants
    ]
    replace(results, variants=tuple(renamed)).save(tmp_path)
    rows = read_observations([tmp_path]).runs
    assert {(row.architecture, row.batch) for row in rows} == {("gpt+", 65_536), ("angpt", 65_536)}


def test_laws_are_of_one_optimizer(tmp_path):
    def folder(size, **optimizers):
        path = tmp_path / "-".join([str(size), *optimizers.values()])
        path.mkdir()
        results = experiment(size, 4e-3)
        replace(results, setup={**results.setup, "optimizers": optimizers}).save(path)
        return path

    mixed = [folder(size, **{"angpt": "muon", "gpt+": "adam"}) for size in (2_000_000, 8_000_000)]
    observed = read_observations(mixed)
    assert {name: settings["optimizer"] for name, settings in observed.training.items()} == {
        "angpt": "muon",
        "gpt+": "adam",
    }
    fits = {fitted.name: fitted for fitted in fit(observed)}
    assert fits["angpt"].content()["training"]["optimizer"] == "muon"
    with pytest.raises(DataError) as raised:
        read_observations([*mixed, folder(4_000_000, **{"angpt": "muon", "gpt+": "muon"})])
    assert mentions(raised.value, "gpt+", "muon", "adam", "4000000-muon-muon")
    several = experiment(2_000_000, 4e-3)
    by_variant = {"gpt+": "adam", "angpt": "muon", "angpt-adam": "adam"}
    several, method = replace(several, setup={**several.setup, "optimizers": by_variant}), several.variants[1]
    (tmp_path / "both").mkdir()
    replace(several, variants=(*several.variants, replace(method, name="angpt-adam"))).save(tmp_path / "both")
    with pytest.raises(DataError) as raised:
        read_observations([tmp_path / "both"])
    assert mentions(raised.value, "angpt", "muon", "adam", str(tmp_path / "both"))
    assert "training" not in fit_optima([BestSettings("angpt", n, 8192, 1e-3) for n in (1e6, 4e6)])[0].content()


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("schedule", "linear", "cosine"),
        ("decay_fraction", 0.2, None),
        ("min_lr_ratio", 0.1, 0.01),
        ("ema", 0.05, 0.0),
        ("precision", "bfloat16", "float32"),
        ("document_mask", True, False),
    ],
)
def test_laws_are_of_runs_that_were_trained_alike(name, value, other, tmp_path, capsys):
    folders = [write_folder(tmp_path / str(size), size, 4e-3, trained={}) for size in (2_000_000, 4_000_000)]
    assert len(read_observations(folders).runs) == 2 * 2 * 6
    folders.append(write_folder(tmp_path / "different", 8_000_000, 4e-3, trained={name: value}))
    assert main(["fit", *map(str, folders), "--out", str(tmp_path / "charts")]) == 2
    captured = capsys.readouterr()
    assert mentions(captured.err, folders[-1], name, value, other) and captured.err.count("\n") == 1
    assert not (tmp_path / "charts").exists()
    # The precision of a run of an earlier release, and the settings of deleted runs, are unknown.
    write_folder(tmp_path / "earlier", 8_000_000, 4e-3, trained={"precision": "auto"})
    write_folder(tmp_path / "deleted", 16_000_000, 4e-3)
    assert len(read_observations([*folders[:2], tmp_path / "earlier", tmp_path / "deleted"]).runs) == 4 * 2 * 6


def test_losses_with_common_and_with_separate_rates_give_no_common_law(tmp_path):
    common, results = write_folder(tmp_path / "common", 2_000_000, 4e-3), experiment(8_000_000, 4e-3)
    added = [replace(trial, setting="embed_lr") for trial in results.variants[1].trials_of("lr", 2_000_000)]
    method = replace(results.variants[1], trials=(*results.variants[1].trials, *added))
    (tmp_path / "separate").mkdir()
    replace(results, variants=(results.baseline, method)).save(tmp_path / "separate")
    with pytest.raises(DataError) as raised:
        read_observations([common, tmp_path / "separate"])
    assert mentions(raised.value, tmp_path / "separate", "angpt", "separate_rates")


def test_rates_are_those_at_the_length_of_the_run(tmp_path):
    horizon = {"lr_horizon": 250, "horizon_exponent": 0.5}
    for name, trained in (("exact", {}), ("horizon", horizon)):
        write_folder(tmp_path / name, 2_000_000, 4e-3, searches=(500_000, 2_048_000), trained=trained)
    exact, scaled = (read_observations([tmp_path / name]) for name in ("exact", "horizon"))
    for ours, given in ((scaled.searches, exact.searches), (scaled.runs, exact.runs)):
        for row, same in zip(ours, given, strict=True):
            assert row.lr == pytest.approx(same.lr * min(1, (250 / (row.tokens // 2048)) ** 0.5))
    assert {row.tokens: row.lr for row in scaled.searches}[2_048_000] == pytest.approx(4e-3 * 4 / 2)


def test_comparisons_of_several_widths_with_a_rate_for_one_of_them_give_no_law_of_the_rate(tmp_path):
    widths = {64: 2_000_000, 128: 8_000_000}
    for lr_width, has_law in ((0, True), (128, False)):
        folders = [
            write_folder(
                tmp_path / f"{lr_width}-{width}", size, 4e-3, trained={"lr_width": lr_width, "model": {"width": width}}
            )
            for width, size in widths.items()
        ]
        assert all(("lr" in fitted.laws) == has_law for fitted in fit(read_observations(folders)))


def test_an_optimum_at_an_edge_is_left_out_with_a_note():
    rows = [row for row in grid_search() if row.parameters != SIZES[3] or row.lr < 1e-3]
    (angpt,) = fit(Observations(tuple(rows), tuple(rows)))
    assert angpt.laws["lr"].points == angpt.laws["batch"].points == 3
    assert not angpt.optima[3].known_lr and not angpt.optima[3].known_batch
    for name in ("batch", "lr"):
        assert any(re.search(rf"{LAWS[name][0]}\b.*\b1\b.*\b4\b.*\b240M\b", note) for note in angpt.notes)
    drawn = {chart.name: chart for chart in charts([angpt], rows)}
    hollow = [line for line in drawn["best-lr"].figure.axes[0].get_lines() if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in hollow] == [[SIZES[3]]]


def test_one_size_per_bin_gives_no_law_of_the_best_size():
    rows = [row for row in grid_search() if row.tokens == 20 * row.parameters]  # so every bin has one size
    (angpt,) = fit(Observations((), tuple(rows)))
    assert not {"size", "tokens", "batch", "lr"} & angpt.laws.keys() and "loss" in angpt.laws
    for words in (r"\b4\b.*\b4\b", rf"{LAWS['size'][0]}\b.*\b0\b", rf"{LAWS['tokens'][0]}\b.*\b0\b"):
        assert any(re.search(words, note) for note in angpt.notes), words
    assert len(angpt.notes) == 6 and angpt.surface is None


def test_a_diverged_run_does_not_change_the_surface(tmp_path):
    rows = grid_search()
    worst = Observation("angpt", SIZES[0], 1e6, 2048, 1.0, math.inf)
    source = write_table(tmp_path / "runs.csv", [*rows, worst])
    observed = read_observations([source])
    assert observed.runs[-1].loss == math.inf
    assert fit(observed)[0].surface == fit(Observations((), tuple(rows)))[0].surface


def length_search(sizes, lengths, exponent=0.4):
    """Runs whose best learning rate is 1e-3 at 1,000 steps of a size of 1M, ~ N^-0.2 and ~ steps^-exponent."""
    rows = []
    for n, steps in itertools.product(sizes, lengths):
        best = 1e-3 * (n / 1e6) ** -0.2 * (steps / 1000) ** -exponent
        for rate in 1e-3 * 2.0 ** np.arange(-6, 7):
            rows.append(Observation("angpt", n, steps * 2048, 2048, rate, 3 + 0.1 * math.log(rate / best) ** 2))
    return rows


def test_the_exponent_of_the_learning_rate_over_steps_is_recovered(tmp_path, capsys):
    rows = length_search((1e6, 4e6), (100, 400, 1600))
    (fitted,) = fit(Observations(rows, rows))
    horizon = fitted.horizon
    assert horizon.exponent == pytest.approx(0.4, abs=0.01) and horizon.points == 6
    assert horizon.interval[0] < 0.4 < horizon.interval[1] and horizon.span == (100, 1600)
    # At one number of tokens per parameter the larger size takes four times the steps.
    assert fitted.laws["lr"].exponent == pytest.approx(-0.2 - 0.4, abs=0.01)
    shortest = [row for row in rows if row.tokens == 100 * 2048]
    assert fit(Observations(shortest, shortest))[0].horizon is None
    close = length_search((1e6, 4e6), (1000, 1050))
    assert fit(Observations(close, close))[0].horizon is None
    one_size = write_table(tmp_path / "runs.csv", length_search((1e6,), (100, 1600)))
    assert main(["fit", str(one_size), "--json", str(tmp_path / "laws.json"), "--out", str(tmp_path / "charts")]) == 0
    content = json.loads((tmp_path / "laws.json").read_text())["angpt"]["horizon"]
    assert content["exponent"] == pytest.approx(0.4, abs=0.01) and content["interval"] == [None, None]
    assert re.search(r"p = 0\.4\d\d\b.*\b100 \S+ 1,600\b.* 2 *\n", capsys.readouterr().out)


def test_an_architecture_with_one_size_is_no_error_next_to_others():
    one_size = [replace(row, architecture="ngpt") for row in grid_search(sizes=SIZES[:1])]
    diverged = [replace(row, architecture="dyt", loss=math.inf) for row in one_size]
    rows = (*grid_search(), *one_size, *diverged)
    fits = {fitted.name: fitted for fitted in fit(Observations(rows, rows))}
    assert "lr" not in fits["ngpt"].laws and fits["angpt"].laws["lr"].points == 4
    for name in ("batch", "lr"):
        assert any(re.search(rf"{LAWS[name][0]}\b.*\b1\b.*\b2\b", note) for note in fits["ngpt"].notes)
    assert not fits["dyt"].optima and not fits["dyt"].laws and "loss" in fits["dyt"].notes[-1]
    assert charts(list(fits.values()), rows)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", r"runs\.csv: .*architecture.*parameters.*tokens.*batch.*lr.*loss"),
        (f"{HEADER}\n", r"runs\.csv"),
        ("architecture,parameters,tokens,lr,loss\nangpt,1,1,1,1\n", rf"runs\.csv: .*\bbatch\b.*{HEADER}"),
        (f"{HEADER}\nangpt,1e6,1e7,2048,1e-3,3\nangpt,2e6,1e7,2048,1e-3,-3\n", r"runs\.csv: .*2.*3.*\bloss\b.* -3"),
        (f"{HEADER}\nangpt,1e6,1e7,2048,fast,3\n", r"runs\.csv: .*1.*2.*\blr\b.*'fast'"),
        (f"{HEADER}\nangpt,1e6,1e7,2048,1e-3\n", r"runs\.csv: .*1.*2.*\bloss\b.*''"),
        (f"{HEADER}\nangpt,1e6,inf,2048,1e-3,3\n", r"runs\.csv: .*1.*2.*\btokens\b.*\binf\b"),
        (f"{HEADER}\nangpt,1e6,1e7,2048,1e-3,nan\n", r"runs\.csv: .*1.*2.*\bloss\b.*\bnan\b"),
        (f"{HEADER},loss\nangpt,1e6,1e7,2048,1e-3,3,9\n", r"runs\.csv: .*\bloss\b"),
        (f"{HEADER}\n,1e6,1e7,2048,1e-3,3\n", r"runs\.csv: .*1.*2.*\barchitecture\b"),
        (f"{HEADER}\nangpt,1e6,1e7,2048,1e-3,3\nangpt,1e6,1e7,2048,2e-3,2.9\n", r"\bangpt\b"),
        (b"PK\x03\x04\xff\xfe", r"runs\.csv: .*\butf-8\b"),
    ],
)
def test_a_bad_table_gives_one_line_and_status_2(text, pattern, tmp_path, capsys):
    source = tmp_path / "runs.csv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["fit", str(source), "--out", str(tmp_path / "charts")]) == 2
    captured = capsys.readouterr()
    assert re.search(pattern, captured.err), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "charts").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["RESULTS", "--optima"]),
        (["one", "--optima", "optima.csv"], ["RESULTS", "--optima"]),
        (["nowhere.csv"], ["nowhere.csv", os.strerror(errno.ENOENT)]),
        (["empty"], ["empty"]),
        (["one", "other"], ["other ", "data", " one"]),
        (["one", "ablated"], ["ablated"]),
        (["one", "bare"], ["bare", "'batch_tokens'"]),
        (["--optima", "optima.csv", "--out", "optima.csv"], ["optima.csv", "--out"]),
        (["--optima", "optima.csv", "--out", "optima.csv/charts"], ["optima.csv", "--out"]),
        (["--optima", "optima.csv", "--json", "no/where.json"], ["--json", "no/where.json"]),
        (["one", "--bins", "none"], ["--bins", "'none'"]),
        (["--optima", "single.csv"], ["angpt"]),
        (["--optima", "negative.csv"], ["negative.csv", "1", "2", "batch", "-1"]),
    ],
)
def test_a_usage_error_gives_one_line_and_status_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optima.csv").write_text(OPTIMA)
    (tmp_path / "single.csv").write_text("".join(OPTIMA.splitlines(keepends=True)[:2]))
    (tmp_path / "negative.csv").write_text("architecture,parameters,batch,lr\nangpt,1e6,-1,1e-3\n")
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "one", 2_000_000, 4e-3)
    write_folder(tmp_path / "other", 8_000_000, 4e-3, data_digest="xyz")
    write_folder(tmp_path / "ablated", 8_000_000, 4e-3, kind="ablate")
    results = experiment(8_000_000, 4e-3)
    del results.setup["batch_tokens"]
    (tmp_path / "bare").mkdir()
    results.save(tmp_path / "bare")
    assert main(["fit", *arguments]) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err for word in words), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("bins", [0, -3])
def test_a_number_of_bins_below_1_is_refused(bins, tmp_path):
    source = write_table(tmp_path / "runs.csv", grid_search(sizes=SIZES[:2]))
    with pytest.raises(ConfigError) as raised:
        antransformer.fit(source, bins=bins)
    assert mentions(raised.value, "bins", 1, bins)


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optima.csv").write_text(OPTIMA)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["fit", "--optima", "optima.csv", "--json", "laws.json"]) == 0
    assert "matplotlib" in capsys.readouterr().out and (tmp_path / "laws.json").exists()
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert main(["fit", "--optima", "optima.csv"]) == 2
    errors = capsys.readouterr().err
    assert "scipy" in errors and "'antransformer[analysis]'" in errors
