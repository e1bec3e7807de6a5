import math
import sys
from collections import Counter
from dataclasses import replace

import pytest

from antransformer.comparison import ablate, compare
from antransformer.comparison.estimate import estimate
from antransformer.comparison.experiment import Experiment, Plan, VariantSpec
from antransformer.comparison.tuning import tuning_label, tuning_scope
from antransformer.comparison.variants import named_variants
from antransformer.data import Dataset
from antransformer.errors import ConfigError, DataError
from antransformer.models import registry
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.comparison import Results
from antransformer.runs.queue import RunQueue
from antransformer.runs.search import EXTENSIONS
from antransformer.runs.settings import value_of
from antransformer.training.config import TrainConfig, resolve_config
from antransformer.training.learning_rates import peak_rates
from antransformer.training.optimizer_registry import OPTIMIZERS
from helpers.fake_queue import FakeQueue
from helpers.messages import mentions
from helpers.small import SMALL

COMMON = {"recipe": "paper", "batch_tokens": 256, "model": SMALL}
BUDGETS = (2560, 5120, 10240)


def bowl(best):
    """A loss with its minimum at a learning rate, given by architecture."""
    return lambda config: 3 + math.log(config.lr / best[config.model.architecture]) ** 2 - 1e-6 * config.tokens


def own_bowl(config):
    """A loss with its minimum at the defaults of the architecture's own hyperparameters."""
    if config.model.architecture == "gpt+":
        return math.log(config.model.init_std / 0.125) ** 2 + math.log(config.weight_decay / 0.1) ** 2
    return math.log(config.model.s_scale / 0.03) ** 2


def moving_bowl(best):
    """A loss whose best learning rate changes with the budget: ``best`` by architecture and then by tokens."""
    return lambda config: 3 + math.log(config.lr / best[config.model.architecture][config.tokens]) ** 2


def values_of(variant, setting="lr"):
    """Values of a setting in the last pass at each budget, ascending."""
    budgets = dict.fromkeys(trial.tokens for trial in variant.trials if trial.setting == setting)
    return {tokens: [trial.value for trial in variant.trials_of(setting, tokens)] for tokens in budgets}


def plan_of(settings, names, budgets, *arguments, **effort):
    return compare.plan(settings, named_variants(names), budgets, *arguments, **effort)


def experiment(corpus, loss, architectures=("gpt+", "angpt"), **effort):
    plan = plan_of(COMMON, architectures, BUDGETS, **effort)
    return Experiment(plan, Dataset.open(corpus), FakeQueue(loss), lambda words: None)


def test_every_variant_has_the_same_grid_around_its_own_default(corpus):
    results = experiment(corpus, bowl({"gpt+": 8e-3, "angpt": 1.2e-2}), lr_trials=3, seeds=2).run()
    plus = [0.00267, 4e-3, 8e-3, 1.6e-2, 2.4e-2]  # three around the default, and a third and three times the best
    angpt = [4e-3, 6e-3, 1.2e-2, 2.4e-2, 3.6e-2]
    assert [values_of(item) for item in results.variants] == [
        dict.fromkeys(BUDGETS, plus),
        dict.fromkeys(BUDGETS, angpt),
    ]
    assert [variant.settings["lr"] for variant in results.variants] == [8e-3, 1.2e-2]
    assert results.baseline.name == "gpt+"


def test_each_budget_is_searched_around_the_choice_of_the_next_shorter_one(corpus):
    best = {
        "gpt+": dict(zip(BUDGETS, (1.6e-2, 8e-3, 4e-3), strict=True)),
        "angpt": dict(zip(BUDGETS, (1.2e-2, 1.2e-2, 2.4e-2), strict=True)),
    }
    made = experiment(corpus, moving_bowl(best), lr_trials=3, seeds=1)
    results = made.run()
    for variant in results.variants:
        assert {tokens: variant.settings_at(tokens)["lr"] for tokens in BUDGETS} == best[variant.name]
        assert all(variant.search_budget("lr", tokens) == tokens for tokens in BUDGETS)
        assert variant.settings["lr"] == best[variant.name][BUDGETS[-1]]
    grids = values_of(results.baseline)
    assert {8e-3, 1.6e-2, 3.2e-2} < set(grids[BUDGETS[1]]) and 1.6e-2 not in grids[BUDGETS[1]][:2]
    assert {2e-3, 4e-3, 8e-3, 1.6e-2} < set(grids[BUDGETS[2]]) and 3.2e-2 not in grids[BUDGETS[2]]
    assert sorted(made.queue.calls[-1]) == sorted(
        f"{name}-{tokens}-lr{best[name][tokens]:g}-seed1" for name in best for tokens in BUDGETS
    )


def test_a_search_at_one_budget_is_not_tuning_at_the_others(corpus):
    best = {name: dict(zip(BUDGETS, (1.6e-2, 8e-3, 4e-3), strict=True)) for name in ("gpt+", "angpt")}
    results = experiment(corpus, moving_bowl(best), lr_trials=3, seeds=1, trial_tokens=BUDGETS[1]).run()
    for variant in results.variants:
        assert set(values_of(variant)) == {BUDGETS[1]}
        assert [item.trial_tokens for item in variant.chosen] == [BUDGETS[1]] * 3
        assert len({variant.settings_at(tokens)["lr"] for tokens in BUDGETS}) == 1
    assert results.baseline.settings_at(BUDGETS[0])["lr"] == 8e-3
    labels = [tuning_label(results, tokens) for tokens in BUDGETS]
    assert len(set(labels)) == 2 and labels[1] == "tuned" and "5.12K" in labels[0]
    assert "5.12K" in tuning_scope(results)


def test_the_budget_of_the_only_search_is_rounded_as_the_budgets_are(corpus):
    made = experiment(corpus, lambda config: 3.0, lr_trials=3, seeds=1, trial_tokens=BUDGETS[1] + 100)
    assert made.plan.trial_tokens == BUDGETS[1]
    results = made.run()
    assert tuning_label(results, BUDGETS[1]) == "tuned"
    assert ablate.plan(COMMON, ["no-lerp"], BUDGETS, trial_tokens=BUDGETS[1] + 100).trial_tokens == BUDGETS[1]


def test_an_exponent_needs_its_horizon():
    with pytest.raises(ConfigError) as error:
        plan_of({**COMMON, "horizon_exponent": 0.5}, ("gpt+", "angpt"), BUDGETS)
    assert mentions(error.value, "horizon_exponent", "lr_horizon")


def test_variants_of_the_same_settings_are_refused():
    for names in (("angpt", "angpt-paper"), ("gpt+", "angpt-muon-paper", "angpt-paper-muon")):
        with pytest.raises(ConfigError) as error:
            plan_of(COMMON, names, BUDGETS)
        assert mentions(error.value, *names[-2:])
    plan_of(COMMON, ("angpt", "angpt-best", "angpt-muon"), BUDGETS)


def test_cautious_decay_is_for_the_variants_that_have_decay(corpus):
    for names in (("gpt+", "angpt"), ("angpt", "gpt+")):
        plan = plan_of({**COMMON, "cautious_weight_decay": True}, names, BUDGETS, seeds=1)
        made = Experiment(plan, Dataset.open(corpus), FakeQueue(lambda config: 3.0), print)
        decays = {state.spec.name: made.config(state, BUDGETS[0], 1).cautious_weight_decay for state in made.states}
        assert decays == {"gpt+": True, "angpt": False}


def test_default_rates_are_not_called_tuned(corpus):
    """A searched hyperparameter does not make the learning rates tuned."""
    results = experiment(corpus, bowl({"gpt+": 8e-3, "angpt": 1.2e-2}), tuning_trials=3, seeds=1).run()
    assert results.baseline.search_budget("lr", BUDGETS[0]) == 0
    assert results.baseline.search_budget("model.init_std", BUDGETS[0]) == BUDGETS[0]
    assert {tuning_label(results, tokens) for tokens in BUDGETS}.isdisjoint({"tuned"})
    assert not {format_count(tokens) for tokens in BUDGETS} & set(tuning_scope(results).split())


def test_default_rates_are_those_of_train_for_the_length_of_the_run(corpus):
    budgets, common = (256 * 100, 256 * 1600), {**COMMON, "recipe": "best"}
    plan = plan_of(common, ("gpt+", "angpt-muon"), budgets, seeds=1)
    made = Experiment(plan, Dataset.open(corpus), FakeQueue(lambda config: 3.0), print)
    muon = made.run().variants[1]
    for tokens in budgets:
        settings = {**common, "tokens": tokens, "architecture": "angpt", "optimizer": "muon"}
        expected = peak_rates(resolve_config(settings, Dataset.open(corpus).vocab_size))
        assert peak_rates(made.config(made.states[1], tokens, 1)) == pytest.approx(expected, rel=0.005)
        chosen = muon.settings_at(tokens)
        assert f"angpt-muon-{tokens}-lr{chosen['lr']:g}-muon{chosen['muon_lr']:g}-seed1" in made.queue.calls[-1]
    assert muon.settings_at(budgets[1])["lr"] < muon.settings_at(budgets[0])["lr"]


def test_a_horizon_that_the_user_gives_scales_searched_rates_too(corpus):
    plan = plan_of({**COMMON, "lr_horizon": 10, "horizon_exponent": 0.5}, ("gpt+", "angpt"), BUDGETS, lr_trials=3)
    made = Experiment(plan, Dataset.open(corpus), FakeQueue(bowl({"gpt+": 8e-3, "angpt": 1.2e-2})), print)
    results = made.run()
    assert values_of(results.variants[1])[BUDGETS[0]] == [4e-3, 6e-3, 1.2e-2, 2.4e-2, 3.6e-2]
    assert made.config(made.states[1], BUDGETS[2], 1).lr_horizon == 10


def test_a_best_value_at_the_edge_extends_the_grid_until_it_is_inside(corpus):
    results = experiment(corpus, bowl({"gpt+": 3.2e-2, "angpt": 1.2e-2}), lr_trials=3).run()
    values = values_of(results.variants[0])
    assert values[BUDGETS[0]] == [4e-3, 8e-3, 0.0107, 1.6e-2, 3.2e-2, 6.4e-2, 9.6e-2]
    assert values[BUDGETS[1]] == [0.0107, 1.6e-2, 3.2e-2, 6.4e-2, 9.6e-2]  # around 3.2e-2 from the beginning
    assert results.variants[0].settings["lr"] == 3.2e-2
    assert len(values_of(results.variants[1])[BUDGETS[0]]) == 5  # the other grid is not extended


def test_a_better_value_outside_the_grid_extends_it_too(corpus):
    """The grid has the higher of two minima inside, and a value outside is on the slope of the lower one."""
    bottom = {1.2e-2: 3.0, 4e-3: 2.9, 2e-3: 2.8, 1e-3: 2.85}
    made = experiment(corpus, lambda config: bottom.get(config.lr, 3.1), architectures=("gpt+", "angpt"), lr_trials=3)
    results = made.run()
    assert values_of(results.variants[1])[BUDGETS[0]] == [1e-3, 2e-3, 4e-3, 6e-3, 1.2e-2, 2.4e-2, 3.6e-2]
    assert results.variants[1].settings_at(BUDGETS[0])["lr"] == 2e-3
    assert not results.variants[1].best_at_edge("lr", BUDGETS[0])


def test_where_all_trials_diverge_the_lowest_value_is_chosen(corpus):
    made = experiment(corpus, lambda config: math.inf, lr_trials=3, seeds=1)
    results = made.run()
    grid = values_of(results.variants[1])[BUDGETS[0]]
    assert results.variants[1].settings_at(BUDGETS[0])["lr"] == min(grid) < 3e-4
    assert min(grid) in values_of(results.variants[1])[BUDGETS[1]]


def test_each_setting_has_the_same_number_of_trials_and_the_plan_counts_them(corpus):
    best = {"gpt+": 8e-3, "angpt": 1.2e-2, "ngpt": 6e-3}

    def loss(config):
        return bowl(best)(config) + own_bowl(config)

    made = experiment(corpus, loss, architectures=tuple(best), lr_trials=3, tuning_trials=3, seeds=2)
    results = made.run()
    own = {"gpt+": 2, "angpt": 1, "ngpt": 1}  # GPT+ has weight decay, too
    for item in results.variants:
        last = [trial for trial in item.trials if trial in item.trials_of(trial.setting, trial.tokens)]
        assert len(last) == 3 * (5 + 3 * own[item.name])
    names = {name for call in made.queue.calls for name in call}
    tokens = sum(int(name.removesuffix(name[name.index("-lr") :]).rpartition("-")[2]) for name in names)
    planned = [made.plan.runs_of(name) for name in best]
    assert planned == [dict.fromkeys(BUDGETS, 5 + 2 * own[name] + 2) for name in best]
    assert sum(sum(counts.values()) for counts in planned) == len(names)
    assert sum(budget * count for counts in planned for budget, count in counts.items()) == tokens


def test_the_estimate_counts_what_is_left(corpus, tmp_path):
    plan = plan_of(COMMON, ("gpt+", "angpt"), BUDGETS, lr_trials=3, tuning_trials=3, seeds=2)
    made = Experiment(plan, Dataset.open(corpus), RunQueue(tmp_path, Dataset.open(corpus), ["cpu"], None), print)
    lines = []
    first = estimate(made, lines.append)
    planned = 2 * (5 + 2 + 2) + 2  # GPT+ searches one setting more than anGPT
    most, second_pass = planned + 5 * EXTENSIONS, 5 * (2 + EXTENSIONS)
    assert first.runs == (3 * planned, 3 * most + second_pass)
    assert first.tokens == (planned * sum(BUDGETS), most * sum(BUDGETS) + second_pass * BUDGETS[0])
    assert 0 < first.hours[0] < first.hours[1]
    assert [mentions(line, name) for line, name in zip(lines, ("gpt+", "angpt"), strict=True)] == [True, True]
    assert not list(tmp_path.iterdir())
    for number in range(2):
        (tmp_path / f"angpt-5120-lr0.0{number}-seed0").mkdir()
        (tmp_path / f"angpt-5120-lr0.0{number}-seed0/result.json").write_text("{}")
    (tmp_path / "angpt-5120-lr0.3-seed0").mkdir()  # not finished
    assert [before - now for before, now in zip(first.runs, estimate(made, print).runs, strict=True)] == [2, 2]
    for seed in range(1, 9):  # two of these are measured runs of this plan, and none is a trial
        (tmp_path / f"gpt+-5120-lr0.01-seed{seed}").mkdir()
        (tmp_path / f"gpt+-5120-lr0.01-seed{seed}/result.json").write_text("{}")
    assert [before - now for before, now in zip(first.runs, estimate(made, print).runs, strict=True)] == [4, 4]


def test_an_ablation_without_a_search_has_a_single_estimate(corpus, tmp_path):
    plan = ablate.plan(COMMON, ["no-lerp", "warm-up"], BUDGETS[:1], seeds=2)
    made = Experiment(plan, Dataset.open(corpus), RunQueue(tmp_path, Dataset.open(corpus), ["cpu"] * 3, None), print)
    lines = []
    expected = estimate(made, lines.append)
    assert expected.runs == (6, 6) and expected.tokens == (6 * BUDGETS[0],) * 2 and len(lines) == 1


def test_a_longer_budget_adds_its_own_runs_only(corpus):
    def names_at(budgets):
        plan = plan_of(COMMON, ("gpt+", "angpt"), budgets, lr_trials=3, seeds=2)
        queue = FakeQueue(bowl({"gpt+": 1.6e-2, "angpt": 1.2e-2}))
        Experiment(plan, Dataset.open(corpus), queue, print).run()
        return {name for call in queue.calls for name in call}

    short, more = names_at(BUDGETS[:2]), names_at(BUDGETS)
    assert short < more and all(f"-{BUDGETS[2]}-" in name for name in more - short)


def test_trials_have_their_own_seed(corpus):
    made = experiment(corpus, bowl({"gpt+": 8e-3, "angpt": 1.2e-2}), lr_trials=3, seeds=2)
    results = made.run()
    trials, runs = made.queue.calls[0], made.queue.calls[-1]
    assert all(name.endswith("seed0") for name in trials) and not set(trials) & set(runs)
    assert len(runs) == 2 * 3 * 2 and results.seeds == (1, 2)
    for variant in results.variants:
        assert variant.losses(results.budgets, results.seeds).shape == (3, 2)


def test_a_diverged_trial_is_never_the_best(corpus):
    def loss(config):
        return math.inf if config.lr > 1e-2 else 3 - config.lr

    results = experiment(corpus, loss, lr_trials=3).run()
    assert results.variants[0].settings["lr"] == 8e-3 and results.variants[1].settings["lr"] == 6e-3
    assert any(math.isinf(trial.loss) for trial in results.variants[1].trials)


def test_the_hyperparameter_is_searched_at_the_best_learning_rate(corpus):
    def loss(config):
        own = (
            (config.model.init_std or 0.0417) / 0.0417,
            (config.model.s_scale or 0.01) / 0.01,
            (config.weight_decay or 0.1) / 0.1,
        )
        return bowl({"gpt+": 1.6e-2, "angpt": 1.2e-2})(config) + sum(math.log(ratio) ** 2 for ratio in own)

    made = experiment(corpus, loss, lr_trials=3, tuning_trials=3)
    results = made.run()
    plus, angpt = results.variants
    assert (plus.settings["lr"], plus.settings["model.init_std"]) == (1.6e-2, 0.0417)
    assert (angpt.settings["lr"], angpt.settings["model.s_scale"]) == (1.2e-2, 0.01)
    assert {trial.setting for trial in plus.trials} == {"lr", "model.init_std", "weight_decay"}
    names = {name for call in made.queue.calls for name in call}
    assert "gpt+-10240-lr0.016-init_std0.0417-seed1" in names
    # The middle of the hyperparameter's grid is the run at the best learning rate, which the queue skips.
    center = "gpt+-5120-lr0.016-init_std0.0417-seed0"
    assert sum(center in call for call in made.queue.calls) == 3 and center in {trial.folder for trial in plus.trials}
    # A longer budget starts from both choices of the shorter one.
    assert "gpt+-5120-lr0.016-init_std0.0417-seed0" in {trial.folder for trial in plus.trials if trial.setting == "lr"}


def test_the_learning_rate_of_muon_is_searched_after_that_of_adam_with_the_same_number_of_trials(corpus):
    def loss(config):
        distance = (
            0 if config.muon_lr is None else math.log(config.muon_lr / (2 * OPTIMIZERS["muon"].default_lrs["angpt"]))
        )
        return bowl({"gpt+": 8e-3, "angpt": 1.2e-2})(config) + distance**2

    made = experiment(corpus, loss, architectures=("gpt+", "angpt-muon"), lr_trials=3)
    plus, muon = made.run().variants
    assert {trial.setting for trial in plus.trials} == {"lr"} and "muon_lr" not in plus.settings
    trials = Counter((trial.pass_number, trial.setting) for trial in muon.trials if trial.tokens == BUDGETS[0])
    # A grid of 3, and one extension for muon_lr. The second pass adds a third and three times the best.
    assert trials == {(1, "lr"): 3, (1, "muon_lr"): 4, (2, "lr"): 5, (2, "muon_lr"): 5}
    assert (muon.settings["optimizer"], muon.settings["lr"]) == ("muon", 1.2e-2)
    assert muon.settings["muon_lr"] == 2 * OPTIMIZERS["muon"].default_lrs["angpt"]
    assert f"angpt-muon-10240-lr0.012-muon{muon.settings['muon_lr']:g}-seed1" in made.queue.calls[-1]


def test_muon_and_normuon_each_search_the_rate_that_they_share(corpus):
    best = {"muon": 0.04, "normuon": 0.08}

    def loss(config):
        return bowl({"angpt": 1.2e-2})(config) + math.log(config.muon_lr / best[config.optimizer]) ** 2

    made = experiment(corpus, loss, architectures=("angpt-muon", "angpt-normuon"), lr_trials=3)
    for variant, optimizer in zip(made.run().variants, best, strict=True):
        assert (variant.settings["optimizer"], variant.settings["muon_lr"]) == (optimizer, best[optimizer])
        assert f"angpt-{optimizer}-10240-lr0.012-muon{best[optimizer]:g}-seed1" in made.queue.calls[-1]


def test_a_comparison_with_muon_for_all_variants(corpus):
    plan = plan_of({**COMMON, "optimizer": "muon"}, ("gpt+", "angpt"), BUDGETS, lr_trials=2, tuning_trials=2)
    results = Experiment(plan, Dataset.open(corpus), FakeQueue(bowl({"gpt+": 8e-3, "angpt": 1.2e-2})), print).run()
    tuned = [{trial.setting for trial in item.trials} for item in results.variants]
    assert tuned == [{"lr", "muon_lr", "model.init_std", "weight_decay"}, {"lr", "muon_lr", "model.s_scale"}]
    specs = compare.variant_specs(named_variants(("gpt+-paper", "gpt+")))
    assert [spec.rates for spec in specs] == [("lr",), ("lr", "muon_lr")]
    assert [spec.hyperparameters for spec in specs] == [("model.init_std", "weight_decay")] * 2


def test_each_variant_may_have_a_recipe_of_its_own(corpus):
    results = experiment(corpus, lambda config: 3.0, architectures=("gpt+-best", "angpt"), seeds=1, lr_trials=2).run()
    best, paper = results.variants
    assert (best.settings["architecture"], best.settings["recipe"]) == ("gpt+", "best")
    assert [{trial.setting for trial in item.trials} for item in (best, paper)] == [{"lr", "muon_lr"}, {"lr"}]
    assert style_of("gpt+-best").label != style_of("gpt+").label and "best" in style_of("gpt+-best").label
    for name, part in (("gptx-best", "gptx"), ("angpt-bets", "angpt-bets")):
        with pytest.raises(ConfigError, match=part):
            plan_of(COMMON, ("gpt+", name), BUDGETS)


def test_variants_differ_only_in_the_model_and_tuned_settings(corpus):
    """All variants have the same batches, budgets and validation windows."""
    configs: list[TrainConfig] = []

    def loss(config):
        configs.append(config)
        return 3.0

    experiment(corpus, loss, architectures=("gpt+", "gpt", "ngpt", "ln-scaling", "dyt", "angpt"), seeds=1).run()
    different = {"model", "lr", "warmup_fraction", "weight_decay"}
    for tokens in BUDGETS:
        shared = [
            {name: value for name, value in vars(config).items() if name not in different}
            for config in configs
            if config.tokens == tokens
        ]
        assert len(shared) == 6 and all(entry == shared[0] for entry in shared)
    assert len({config.model.width for config in configs}) == 1


def test_only_the_first_seed_of_the_longest_budget_keeps_its_checkpoint(corpus):
    made = experiment(corpus, bowl({"gpt+": 8e-3, "angpt": 1.2e-2}), seeds=2)
    kept = [(tokens, seed) for tokens in BUDGETS for seed in (0, 1, 2) if made.job(made.states[0], tokens, seed).keep]
    assert kept == [(BUDGETS[-1], 1)]


@pytest.mark.parametrize(
    ("program", "expected"),
    [("/usr/bin/antransformer", "antransformer compare --quick"), ("study.py", "python study.py compare --quick")],
)
def test_results_are_saved_and_loaded(corpus, tmp_path, monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [program, "compare", "--quick"])
    made = experiment(corpus, lambda config: math.inf if config.seed == 2 else 3.0, lr_trials=2, seeds=2)
    results = made.run()
    results.save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded == replace(results, setup=loaded.setup)
    assert "Infinity" not in (tmp_path / "results.json").read_text()
    assert results.setup["command"] == expected and results.setup["machines"] == ["a machine"]
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError) as error:
        Results.load(tmp_path)
    assert mentions(error.value, tmp_path / "results.json")
    with pytest.raises(DataError) as error:
        Results.load(tmp_path / "nowhere")
    assert mentions(error.value, tmp_path / "nowhere", "results.json")


def test_budgets_are_rounded_down_to_full_batches():
    assert plan_of(COMMON, ["gpt+", "angpt"], (3000, 6000)).budgets == (2816, 5888)


@pytest.mark.parametrize("tokens", [-5, -256, 100])
def test_lengths_below_one_batch_are_refused(tokens):
    for plan in (
        lambda: plan_of(COMMON, ["gpt+", "angpt"], BUDGETS, trial_tokens=tokens),
        lambda: ablate.plan(COMMON, ["no-lerp"], [tokens]),
    ):
        with pytest.raises(ConfigError) as error:
            plan()
        assert mentions(error.value, 256)


def test_default_and_given_budgets():
    assert compare.budgets_of(8_000_000) == (2_000_000, 4_000_000, 8_000_000)
    assert compare.budgets_of(0, ["20M", "5M"]) == (5_000_000, 20_000_000)
    for wrong in (["5M", "5M"], [5000, 5000], ["five"]):
        with pytest.raises(ConfigError) as error:
            compare.budgets_of(0, wrong)
        assert mentions(error.value, "--budgets", " ".join(map(str, wrong)))


def test_wrong_plans_are_refused_before_any_run(corpus):
    for names, budgets, seeds, parts in (
        (["gtp+", "angpt"], BUDGETS, 1, ("gtp+", "gpt+")),
        (["angpt", "angpt"], BUDGETS, 1, ("--architectures", "angpt")),
        (["gpt+", "angpt"], BUDGETS, 0, ("seeds", 0)),
        (["gpt+", "angpt"], (100, 2560), 1, (100, 256, "--budgets", "--batch-tokens")),
        (["gpt+", "angpt"], (2560, 2600), 1, (2560, 256)),
    ):
        with pytest.raises(ConfigError) as error:
            plan_of(COMMON, names, budgets, seeds=seeds)
        assert mentions(error.value, *parts)
    long = {"model": {**SMALL, "context": 10**6}, "batch_tokens": 10**6}
    with pytest.raises(DataError) as error:
        Experiment(plan_of(long, ["gpt+", "angpt"], (10**6,)), Dataset.open(corpus), FakeQueue(None), print)
    longest = max(shard.tokens for shard in Dataset.open(corpus).split("train").shards)
    assert mentions(error.value, "context", 10**6, "train", longest)
    small = {**COMMON, "model": {**SMALL, "vocab_size": 20}}
    with pytest.raises(DataError) as error:
        Experiment(plan_of(small, ["gpt+", "angpt"], BUDGETS), Dataset.open(corpus), FakeQueue(None), print)
    assert mentions(error.value, "model.vocab_size", 20, Dataset.open(corpus).max_token)


def test_the_ablation_suite_is_a_default_and_variants_that_differ_from_it(corpus):
    plan = ablate.plan(COMMON, (), (2560,))
    configs = {}
    made = Experiment(plan, Dataset.open(corpus), FakeQueue(lambda config: 3.0), print)
    for state in made.states:
        configs[state.spec.name] = made.config(state, 2560, 1)
    assert next(iter(configs)) == ablate.DEFAULT
    default = configs.pop(ablate.DEFAULT)
    assert len(configs) >= 19 and len(set(map(repr, configs.values()))) == len(configs)
    assert all(config != default for config in configs.values())
    assert configs["s-scale-sqrt-width"].model.s_scale == pytest.approx(64**-0.5)
    assert configs["warm-up-and-decay"].warmup_fraction == 0.1 and configs["warm-up-and-decay"].weight_decay == 0.1
    results = made.run()
    assert results.kind == "ablate" and results.variants[1].settings["model.ablation"] == "constant-x0.5"


def test_patterns_select_a_part_of_the_suite():
    names = [spec.name for spec in ablate.variant_specs(64, ["all-*", "no-lerp"], "adam")]
    assert names == ["default", "all-x0.5", "all-x2", "all-none", "no-lerp"]
    for only, parts in (("no-lrep", ("no-lrep", "no-lerp")), ("default", ("--only", "default"))):
        with pytest.raises(ConfigError) as error:
            ablate.variant_specs(64, [only], "adam")
        assert mentions(error.value, *parts)


def test_the_searches_have_every_budget_by_default():
    assert Plan("compare", {}, [], (1, 2, 3, 4)).search_budgets() == [1, 2, 3, 4]
    assert Plan("compare", {}, [], (1, 2, 3), trial_tokens=7).search_budgets() == [7]


def test_separate_rates_are_searched_around_what_they_are_derived_from(corpus):
    best = {"gpt+": 8e-3, "angpt": 1.2e-2}

    def loss(config):
        embed, head = config.embed_lr or config.lr, config.head_lr or config.lr
        lr = config.lr if config.muon_lr else math.sqrt(config.lr * (config.vector_lr or config.lr))
        target = best[config.model.architecture]
        distances = (lr / target, embed / (3 * target), head / (target / 3))
        return 3 + own_bowl(config) + sum(math.log(distance) ** 2 for distance in distances)

    effort = {"separate_rates": True, "lr_trials": 3, "tuning_trials": 3, "seeds": 1}
    made = experiment(corpus, loss, architectures=("gpt+", "angpt-muon"), **effort)
    results = made.run()
    order = [list(dict.fromkeys(trial.setting for trial in item.trials)) for item in results.variants]
    assert order[0] == ["lr", "embed_lr", "head_lr", "vector_lr", "model.init_std", "weight_decay"]
    assert order[1] == ["lr", "muon_lr", "embed_lr", "head_lr"]
    for item in results.variants:
        lr = best[item.name.removesuffix("-muon")]
        for tokens in BUDGETS:
            chosen = item.settings_at(tokens)
            assert [chosen[name] for name in ("lr", "embed_lr", "head_lr")] == pytest.approx(
                [lr, 3 * lr, lr / 3], rel=0.01
            )
        first = [trial.value for trial in item.trials if trial.setting == "embed_lr" and trial.pass_number == 1]
        assert first[:3] == pytest.approx([lr / 3, lr, 3 * lr], rel=0.01)
    common = experiment(corpus, loss, architectures=("gpt+", "angpt-muon"), **{**effort, "separate_rates": False}).run()
    assert set(tuning_scope(common).split()) - set(tuning_scope(results).split()) == {"common"}
    counts = {
        name: {len(values_of(item, name)[BUDGETS[-1]]) for item in results.variants} for name in ("lr", "embed_lr")
    }
    assert counts == {"lr": {5}, "embed_lr": {3}}
    folders = {run.folder for run in results.baseline.runs}
    assert f"gpt+-{BUDGETS[0]}-lr0.008-embed_lr0.024-head_lr0.00267-seed1" in folders
    with pytest.raises(ConfigError):
        plan_of(COMMON, ("gpt+", "angpt"), BUDGETS, separate_rates=True)


def test_with_separate_rates_the_fewest_runs_are_those_of_a_search_that_confirms_every_default(corpus):
    common = {**COMMON, "model": {**SMALL, "width": 96}}  # at this width the default of init_std has many digits
    effort = {"separate_rates": True, "lr_trials": 3, "tuning_trials": 3, "seeds": 1}
    plan = plan_of(common, ("gpt+", "angpt"), BUDGETS[:2], **effort)
    names = ("lr", "embed_lr", "head_lr", "vector_lr", "weight_decay", "model.init_std", "model.s_scale")
    defaults = {}

    def loss(config):
        values = {name: value_of(config, name) or config.lr for name in names if name != "weight_decay"}
        values["weight_decay"] = config.weight_decay or 1.0
        default = defaults.setdefault((config.model.architecture, config.tokens), values)
        return sum(math.log(values[name] / default[name]) ** 2 for name in names if default[name])

    made = Experiment(plan, Dataset.open(corpus), FakeQueue(loss), lambda words: None)
    for state in made.states:
        for tokens in plan.budgets:
            loss(made.config(state, tokens, 0))
    made.run()
    run = Counter(tuple(name.split("-")[:2]) for name in {name for call in made.queue.calls for name in call})
    planned = {spec.name: plan.runs_of(spec.name) for spec in plan.specs}
    assert run == {(name, str(tokens)): planned[name][tokens] for name in planned for tokens in plan.budgets}


def test_a_setting_whose_default_is_0_has_no_grid_and_keeps_its_default(corpus, monkeypatch):
    angpt = replace(registry.get("angpt"), tuned_hyperparameters=("weight_decay",))  # 0 by default
    monkeypatch.setitem(registry._loaded, "angpt", angpt)
    results = experiment(corpus, bowl({"gpt+": 8e-3, "angpt": 1.2e-2}), lr_trials=3, tuning_trials=3, seeds=1).run()
    assert {trial.setting for trial in results.variants[1].trials} == {"lr"}
    assert {trial.setting for trial in results.baseline.trials} > {"lr"}


def test_a_second_pass_at_the_shortest_budget_corrects_a_rate_that_was_found_with_others_tied_to_it(corpus):
    def loss(config):
        lr, embed = config.lr, config.embed_lr or config.lr
        return math.log2(lr / 4e-3) ** 2 + math.log2(embed / 2.4e-2) ** 2

    results = experiment(corpus, loss, separate_rates=True, lr_trials=3, tuning_trials=3, seeds=1).run()
    for item in results.variants:
        first = {
            trial.value: trial.loss
            for trial in item.trials
            if (trial.setting, trial.tokens, trial.pass_number) == ("lr", BUDGETS[0], 1)
        }
        assert min(first, key=first.get) > 4e-3 * 1.4  # a compromise between the best rates of blocks and embedding
        assert item.settings_at(BUDGETS[0])["lr"] == pytest.approx(4e-3, rel=0.5)
        passes = {(trial.tokens, trial.pass_number) for trial in item.trials}
        assert passes == {(BUDGETS[0], 1), (BUDGETS[0], 2), (BUDGETS[1], 1), (BUDGETS[2], 1)}
        assert {trial.pass_number for trial in item.trials_of("lr", BUDGETS[0])} == {2}


def test_a_searched_setting_cannot_be_given_for_all_runs():
    spec = VariantSpec("x", {}, ("lr",), ("model.s_scale",))
    for common, effort, name in (
        ({"lr": 0.1}, {"lr_trials": 2}, "lr"),
        ({"model": {"s_scale": 0.1}}, {"tuning_trials": 2}, "model.s_scale"),
    ):
        Plan("compare", common, [spec], (1,))
        with pytest.raises(ConfigError) as error:
            Plan("compare", common, [spec], (1,), **effort)
        assert mentions(error.value, name)


def test_the_quick_comparison_needs_no_more_tokens_than_an_hour_allows():
    """Two CPU cores train 0.5M to 0.73M tokens per minute at this size; extended grids add to the plan."""
    plan = plan_of(compare.QUICK, ("gpt+", "angpt"), compare.QUICK_BUDGETS, True, lr_trials=3, tuning_trials=3)
    planned = [plan.runs_of(spec.name) for spec in plan.specs]
    fewest = [dict.fromkeys(plan.budgets, 3 + 5 + 2 * searched) for searched in (5, 3)]
    for counts in fewest:
        counts[plan.budgets[0]] += 2  # in the second pass lr is searched with the separate rates held
    assert planned == fewest
    second_pass = sum(2 * searched for searched in (5, 3)) * plan.budgets[0]
    assert sum(budget * count for counts in planned for budget, count in counts.items()) + second_pass < 25e6
