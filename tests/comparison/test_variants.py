"""Variants of a comparison with settings of their own."""

import pytest

from antransformer.cli import main
from antransformer.comparison import compare
from antransformer.comparison.experiment import Experiment
from antransformer.comparison.summary import summary
from antransformer.comparison.tuning import tuning_label, tuning_scope
from antransformer.comparison.variants import OwnSettings, named_variants, read_variants
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.results.comparison import Results
from antransformer.results.observations import read_observations
from antransformer.training.run_folder import saved_config
from helpers.fake_queue import FakeQueue
from helpers.messages import mentions
from helpers.pages import ROOT, blocks
from helpers.small import SMALL, SMALL_OPTIONS

COMMON = {"recipe": "paper", "batch_tokens": 256, "model": SMALL}
BUDGETS = (2560, 5120)


def experiment(corpus, variants, common=COMMON, **effort):
    plan = compare.plan(common, read_variants(variants), BUDGETS, seeds=1, **effort)
    return Experiment(plan, Dataset.open(corpus), FakeQueue(lambda config: 3.0), lambda words: None)


def test_a_file_gives_the_same_variants_as_a_mapping(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text(
        "gpt+:\n  lr: 1e-2\n  weight_decay: 0.1\n"
        "angpt-low:\n  architecture: angpt\n  model: {alpha_init: 0.1}\n"
        "  budgets:\n    2.5M: {lr: 2e-2}\n    5M: {lr: 1.5e-2}\n"
        "angpt-muon:\n"
    )
    expected = {
        "gpt+": OwnSettings({"architecture": "gpt+", "lr": 0.01, "weight_decay": 0.1}),
        "angpt-low": OwnSettings(
            {"architecture": "angpt", "model": {"alpha_init": 0.1}},
            {2_500_000: {"lr": 0.02}, 5_000_000: {"lr": 0.015}},
        ),
        "angpt-muon": OwnSettings({"architecture": "angpt", "optimizer": "muon"}),
    }
    assert read_variants(file) == expected
    assert list(read_variants(file)) == list(expected)
    mapping = {
        "gpt+": {"lr": 0.01, "weight_decay": "0.1"},
        "angpt-low": {
            "model": {"architecture": "angpt", "alpha_init": 0.1},
            "budgets": {2_500_000: {"lr": 0.02}, "5M": {"lr": 0.015}},
        },
        "angpt-muon": None,
    }
    assert read_variants(mapping) == expected
    assert read_variants({"gpt+": {}, "angpt-muon": {}}) == named_variants(["gpt+", "angpt-muon"])


def test_runs_have_the_settings_of_their_variant_and_budget(corpus):
    variants = {
        "gpt+": {"weight_decay": 0.03, "lr": 1.23456e-2, "embed_lr": 0.1},
        "angpt": {"schedule": "linear", "budgets": {2560: {"lr": 0.02}, 5120: {"lr": 0.01, "ema": 0}}, "ema": 0.1},
    }
    made = experiment(corpus, variants)
    results = made.run()
    configs = {(config.model.architecture, config.tokens): config for config in made.queue.configs.values()}
    assert len(configs) == len(made.queue.configs) == 4
    for tokens in BUDGETS:
        plus = configs["gpt+", tokens]
        assert (plus.weight_decay, plus.lr, plus.embed_lr, plus.head_lr) == (0.03, 1.23456e-2, 0.1, None)
        assert plus.schedule == "cosine" and configs["angpt", tokens].schedule == "linear"
        assert plus.lr_horizon == configs["angpt", tokens].lr_horizon == 0
    angpt = [configs["angpt", tokens] for tokens in BUDGETS]
    assert [(config.lr, config.ema) for config in angpt] == [(0.02, 0.1), (0.01, 0)]
    assert [results.variants[1].settings_at(tokens)["lr"] for tokens in BUDGETS] == [0.02, 0.01]
    assert results.variants[1].settings["lr"] == 0.01 and results.variants[1].settings["ema"] == 0
    assert results.baseline.settings_at(BUDGETS[0])["embed_lr"] == 0.1


def test_given_settings_are_not_searched_and_not_called_tuned(corpus, tmp_path):
    variants = {"gpt+": {"lr": 8e-3, "embed_lr": 0.05}, "angpt": {}}
    made = experiment(corpus, variants, separate_rates=True, lr_trials=3, tuning_trials=3)
    results = made.run()
    searched = {item.name: {trial.setting for trial in item.trials} for item in results.variants}
    assert searched == {
        "gpt+": {"head_lr", "vector_lr", "model.init_std", "weight_decay"},
        "angpt": {"lr", "embed_lr", "head_lr", "vector_lr"},
    }
    for item in made.plan.specs:
        low, high = (made.plan.runs_of(item.name, most) for most in (False, True))
        run = [name for name in made.queue.configs if name.startswith(f"{item.name}-{BUDGETS[1]}-")]
        assert low[BUDGETS[1]] <= len(run) <= high[BUDGETS[1]]
    labels = {tuning_label(results, tokens) for tokens in BUDGETS}
    assert len(labels) == 1 and not any("tuned" in label for label in labels)
    assert "GPT+" in tuning_scope(results) and "anGPT" not in tuning_scope(results)
    assert "tuned" not in summary(results).split(". ")[0]
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    assert [item.chosen[0].given for item in results.variants] == [("lr", "embed_lr"), ()]
    tied = experiment(corpus, {"gpt+": {}, "angpt": {"embed_lr": 0.05}}, lr_trials=3).run()
    tied.save(tmp_path)
    observed = read_observations([tmp_path])
    assert {row.architecture for row in observed.searches} == {"gpt+"} and observed.separate == {"angpt"}
    both = experiment(corpus, {**variants, "angpt": {"lr": 0.01}}).run()
    assert tuning_scope(both) != tuning_scope(results) and "GPT+" not in tuning_scope(both)
    assert tuning_label(both, BUDGETS[0]) not in labels


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({}, ["variants"]),
        ({"angpt": {}}, ["angpt"]),
        ({"angpt": {}, "angptt": {}}, ["angptt", "angpt"]),
        ({"angpt": {}, "mine": {"lr": 0.01}}, ["mine", "architecture"]),
        ({"angpt": {}, "mine": {"architecture": "angptt"}}, ["mine", "angptt"]),
        ({"angpt": {}, "gpt+": {"architecture": "angpt"}}, ["gpt+", "angpt"]),
        ({"angpt": {}, "gpt+-muon": {"optimizer": "adam"}}, ["gpt+-muon", "optimizer", "adam"]),
        ({"angpt": {}, "a/b": {"architecture": "gpt+"}}, ["a/b"]),
        ({"angpt": {}, "..": {"architecture": "gpt+"}}, [".."]),
        ({"angpt": {}, 3: {"architecture": "gpt+"}}, [3]),
        ({"angpt": {}, "gpt+": 0.01}, ["gpt+", 0.01]),
        ({"angpt": {}, "gpt+": {"lrr": 0.01}}, ["gpt+", "lrr", "lr"]),
        ({"angpt": {}, "gpt+": {"lr": -1}}, ["gpt+", "lr", -1.0]),
        ({"angpt": {}, "gpt+": {"batch_tokens": 512}}, ["gpt+", "batch_tokens"]),
        ({"angpt": {}, "gpt+": {"tokens": 512}}, ["gpt+", "tokens"]),
        ({"angpt": {}, "gpt+": {"context": 64}}, ["gpt+", "model.context"]),
        ({"angpt": {}, "gpt+": {"budgets": {"x": {}}}}, ["gpt+", "budgets", "x"]),
        ({"angpt": {}, "gpt+": {"budgets": {True: {}}}}, ["gpt+", "budgets", True]),
        ({"angpt": {}, "gpt+": {"budgets": [2560]}}, ["gpt+", "budgets"]),
        ({"angpt": {}, "gpt+": {"budgets": {2560: 3}}}, ["gpt+", 2560, 3]),
        ({"angpt": {}, "gpt+": {"budgets": {"5K": {}, 5000: {}}}}, ["gpt+", "5,000"]),
        ({"angpt": {}, "gpt+": {"budgets": {2560: {"optimizer": "adam"}}}}, ["gpt+", 2560, "optimizer"]),
        ({"angpt": {}, "gpt+": {"budgets": {2560: {"model": {"layers": 3}}}}}, ["gpt+", 2560, "model.layers"]),
        ({"angpt": {}, "gpt+": {"budgets": {2560: {"lr": 0.1}, 5120: {"ema": 0.1}}}}, ["gpt+", "2,560", "5,120"]),
        ({"angpt": {}, "gpt+": {"budgets": {2560: {"lr": 0.1}}}}, ["gpt+", "2,560", "5,120"]),
        ({"angpt": {}, "mine": {"architecture": "angpt"}}, ["angpt", "mine"]),
        ({"angpt": {}, "gpt+": {"horizon_exponent": 0.3}}, ["gpt+", "horizon_exponent", "lr_horizon"]),
        ({"angpt": {}, "gpt+": {"schedule": "wsd"}}, ["gpt+", "schedule", "decay_fraction"]),
        ({"gpt+": {"schedule": "wsd"}, "angpt": {}}, ["gpt+", "schedule", "decay_fraction"]),
        ({"angpt": {}, "gpt+": {"model": {"s_scale": 0.1}}}, ["variants: gpt+", "s_scale"]),
    ],
)
def test_wrong_variants_are_refused(corpus, variants, words):
    with pytest.raises(ConfigError) as error:
        experiment(corpus, variants)
    assert mentions(error.value, *words)


def test_the_batch_of_the_baseline_is_that_of_its_settings_together(corpus):
    budgets = {tokens: {"decay_fraction": 0.2} for tokens in BUDGETS}
    baseline = {"model": {"alpha_init": 0.1}, "schedule": "wsd", "budgets": budgets}
    common = {"recipe": "paper", "batch_tokens": SMALL["context"], "model": SMALL}
    made = experiment(corpus, {"angpt": baseline, "gpt+": {}}, common)
    assert {config.batch_tokens for config in made.defaults.values()} == {SMALL["context"]}


def test_settings_of_single_budgets_exclude_a_search_at_another_one(corpus):
    budgets = {tokens: {"lr": 0.01} for tokens in BUDGETS}
    with pytest.raises(ConfigError) as error:
        experiment(corpus, {"angpt": {}, "gpt+": {"budgets": budgets}}, lr_trials=3, trial_tokens=BUDGETS[0])
    assert mentions(error.value, "--trial-tokens")


def test_the_example_of_the_guide_is_a_plan(tmp_path):
    block = next(block for block in blocks(ROOT / "docs/comparing.md") if block.language == "yaml")
    (tmp_path / "variants.yaml").write_text(block.code)
    plan = compare.plan({}, read_variants(tmp_path / "variants.yaml"), (10**7, 2 * 10**7), lr_trials=3)
    assert [spec.name for spec in plan.specs] == ["gpt+", "angpt-deep"]
    assert [spec.searched(spec.rates) for spec in plan.specs] == [(), ("lr", "muon_lr")]


def test_the_verb_runs_variants_of_a_file_and_refuses_a_changed_file(corpus, tmp_path, in_process, capsys):
    file, out = tmp_path / "variants.yaml", tmp_path / "out"
    file.write_text("gpt+: {lr: 8e-3}\nfast:\n  architecture: angpt\n  budgets: {2K: {lr: 0.02}, 4K: {lr: 0.01}}\n")
    words = ["compare", "--recipe=paper", "--data", str(corpus), "--out", str(out), "--seeds=2", "--lr-trials=1"]
    words += ["--tuning-trials=1", "--budgets", "2K", "4K", "--precision=float32", "--batch-tokens=256"]
    words += ["--eval-tokens=1024", "--workers=2", *SMALL_OPTIONS, "--variants", str(file)]
    assert main([*words, "--architectures", "gpt+", "angpt"]) == 2 and not out.exists()
    assert mentions(capsys.readouterr().err, "architectures", "variants")
    assert main(words) == 0
    results = Results.load(out)
    assert [item.name for item in results.variants] == ["gpt+", "fast"] and results.budgets == (1792, 3840)
    rates = {run.tokens: saved_config(out / "runs" / run.folder).lr for run in results.variants[1].runs}
    assert rates == {1792: 0.02, 3840: 0.01}
    assert "fast" in (out / "report.html").read_text()
    file.write_text(file.read_text().replace("0.02", "0.03"))
    before = sorted(path.name for path in (out / "runs").iterdir())
    assert main(words) == 2
    assert mentions(capsys.readouterr().err, "lr", "--out")
    assert before == sorted(path.name for path in (out / "runs").iterdir())
