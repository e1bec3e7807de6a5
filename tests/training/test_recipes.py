"""Recipes: what a word sets, what a user's value overrides, and what a saved run repeats."""

import pytest
import yaml

import antransformer
from antransformer.errors import ConfigError, DataError
from antransformer.training.config import resolve_config, to_mapping
from antransformer.training.learning_rates import peak_rates
from antransformer.training.recipes import DEFAULT_RECIPE, RECIPES, variant_settings
from antransformer.training.run_folder import saved_config
from helpers.commands import refused
from helpers.messages import mentions
from helpers.trainers import losses, resume, run_until, start, weights

LONG = {"tokens": "4M", "batch_tokens": 2048}  # more steps than the horizon of the defaults


@pytest.mark.parametrize("architecture", ["angpt", "gpt+", "ngpt"])
def test_paper_trains_with_adam_at_a_rate_that_no_length_changes(architecture):
    config = resolve_config({"recipe": "paper", "architecture": architecture, **LONG}, 4096)
    assert (config.optimizer, config.schedule, config.min_lr_ratio, config.ema) == ("adam", "cosine", 0.01, 0)
    assert config.muon_lr is None and config.lr_horizon == 0
    longer = resolve_config({"recipe": "paper", "architecture": architecture, **LONG, "tokens": "400M"}, 4096)
    assert peak_rates(longer) == peak_rates(config)


def test_best_is_the_default_and_trains_with_muon_at_rates_for_the_length():
    config = resolve_config(LONG, 4096)
    assert config == resolve_config({"recipe": "best", **LONG}, 4096)
    assert config.recipe == DEFAULT_RECIPE and config.optimizer == "muon"
    assert peak_rates(config).blocks < config.muon_lr


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_saved_run_of_a_recipe_repeats_itself(recipe):
    for settings in ({}, {"optimizer": "adam"}, {"lr": 1e-3}, {"preset": "125m", "tokens": "1B"}):
        config = resolve_config({"recipe": recipe, **LONG, **settings}, 4096)
        assert resolve_config(to_mapping(config), 4096) == config


def test_a_given_setting_takes_precedence_over_the_recipe():
    config = resolve_config({"recipe": "paper", "optimizer": "muon", "lr_horizon": 100, **LONG}, 4096)
    assert config.optimizer == "muon" and config.lr_horizon == 100 and config.horizon_exponent > 0


def test_a_given_lr_moves_the_rate_of_muon_with_it():
    default = resolve_config({"tokens": "204800"}, 4096)
    half = resolve_config({"tokens": "204800", "lr": default.lr / 2}, 4096)
    assert half.muon_lr == pytest.approx(default.muon_lr / 2)
    assert resolve_config({**LONG, "lr": default.lr}, 4096).muon_lr == default.muon_lr  # exact, whatever the length
    assert resolve_config({"lr": 1e-3, "muon_lr": 0.1}, 4096).muon_lr == 0.1


def test_an_unknown_recipe_is_refused_before_a_folder_is_made(capsys, tmp_path):
    out = tmp_path / "run"
    assert mentions(refused(["train", "--recipe", "beste", "--out", out], capsys), "recipe", "beste", *RECIPES)
    assert not out.exists()
    with pytest.raises(ConfigError, match="recipe"):
        resolve_config({"recipe": "none"}, 4096)


def test_names_of_variants_select_recipe_and_optimizer():
    assert variant_settings("angpt") == {"architecture": "angpt"}
    assert variant_settings("gpt+-muon") == {"architecture": "gpt+", "optimizer": "muon"}
    assert variant_settings("ln-scaling-normuon") == {"architecture": "ln-scaling", "optimizer": "normuon"}
    assert variant_settings("gpt+-paper") == {"architecture": "gpt+", "recipe": "paper"}
    for name in ("ngpt-best-adam", "ngpt-adam-best"):
        assert variant_settings(name) == {"architecture": "ngpt", "recipe": "best", "optimizer": "adam"}
    assert variant_settings("gpt+-paper-best")["architecture"] == "gpt+-paper"  # which no architecture has


def test_the_config_of_a_run_keeps_its_recipe(corpus, tmp_path):
    start(corpus, tmp_path / "run", recipe="best")
    file = tmp_path / "run/config.yaml"
    with pytest.raises(ConfigError) as error:
        antransformer.train(config=file, out=tmp_path / "other", recipe="paper")
    assert mentions(error.value, file, "best", "paper") and not (tmp_path / "other").exists()
    short = tmp_path / "short.yaml"
    short.write_text("recipe: best\ndata: web\n")  # a file of the user, in which the recipe is one of the settings
    with pytest.raises(DataError, match="web"):
        antransformer.train(config=short, out=tmp_path / "other", recipe="paper")


@pytest.mark.parametrize("settings", [{"recipe": "paper"}, {"lr": 1e-2}, {"lr_horizon": 0}, {"embed_lr": 1e-2}])
def test_an_exponent_without_a_horizon_is_refused(settings):
    with pytest.raises(ConfigError) as error:
        resolve_config({**settings, **LONG, "horizon_exponent": 0.5}, 4096)
    assert mentions(error.value, "horizon_exponent", "lr_horizon")
    resolve_config({**settings, **LONG, "horizon_exponent": 0.5, "lr_horizon": 100}, 4096)


def test_a_run_that_was_saved_without_a_horizon_has_none(tmp_path):
    """Releases before the horizon scaled no rates, and saved the rate itself."""
    settings = to_mapping(resolve_config({"recipe": "paper", **LONG, "tokens": "8M"}, 4096))
    old = {key: value for key, value in settings.items() if key not in ("lr_horizon", "horizon_exponent", "recipe")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    config = saved_config(tmp_path)
    assert (config.lr, config.lr_horizon, config.horizon_exponent) == (settings["lr"], 0, 0.0)
    assert peak_rates(config).vectors == settings["lr"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_a_recipe_resumes_bit_for_bit(corpus, tmp_path, recipe):
    start(corpus, tmp_path / "uninterrupted", recipe=recipe, lr_horizon=5).run()
    run_until(start(corpus, tmp_path / "interrupted", recipe=recipe, lr_horizon=5), 13)
    trainer, _ = resume(corpus, tmp_path / "interrupted", recipe=recipe)
    assert trainer.config.recipe == recipe and trainer.config.optimizer == RECIPES[recipe]["optimizer"]
    trainer.run()
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "uninterrupted")
    assert weights(tmp_path / "interrupted", 20) == weights(tmp_path / "uninterrupted", 20)
