import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from antransformer import figure_style
from antransformer.comparison import report, statistics
from antransformer.comparison.charts import loss_by_tokens
from antransformer.comparison.summary import summary
from antransformer.errors import MissingExtraError
from antransformer.reporting import labels
from antransformer.results.comparison import Results, Run, Trial, Variant
from helpers.experiments import BUDGETS, SEEDS, chosen, experiment, loss_at, variant

GOLDEN = Path(__file__).parent.parent / "golden"
SPEEDS = {"gpt+": 1.0, "ngpt": 1.25, "angpt": 1.6}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


def trials_of(name, best=0.004, tokens=500_000):
    """Five trials of the learning rate around the best; the largest diverged."""
    rates = [best * 2.0**power for power in (-2, -1, 0, 1, 2)]
    losses = [2.1 + 0.02 * math.log(rate / best) ** 2 for rate in rates[:-1]] + [math.inf]
    return [Trial("lr", rate, loss, f"{name}-{rate}", tokens) for rate, loss in zip(rates, losses, strict=True)]


def pair(speed, **options):
    """Results of GPT+ and of anGPT with this speedup."""
    shape = {key: options[key] for key in ("budgets", "seeds") if key in options}
    return experiment(variant("gpt+", 1.0, **shape), variant("angpt", speed, **options), **shape)


def write_logs(folder, results):
    """Write metrics and probes of each variant's longest run with the first seed."""
    for item in results.variants:
        run = next(run for run in item.runs if (run.tokens, run.seed) == (results.budgets[-1], results.seeds[0]))
        path = folder / "runs" / run.folder
        path.mkdir(parents=True)
        metrics, probes = [], []
        for step in range(1, 21):
            position = {"step": step, "tokens": step * results.budgets[-1] // 20}
            metrics.append({**position, "loss": loss_at(position["tokens"])})
            bounded = item.name != "gpt+"
            growth = 1 if bounded else 400
            probes.append(
                {
                    **position,
                    "residual_norm": [1.0, 1 + growth * step / 20, 1 + 2 * growth * step / 20],
                    "row_norm": {"mean": 1.0, "min": 0.9, "max": 1.0 if bounded else 3.0},
                    "alpha": [[0.05 + step / 200, 0.06], [0.07, 0.08 + step / 200]] if bounded else None,
                    "moment_variance": None if step == 1 else 1 / step,
                }
            )
        for name, lines in (("metrics", metrics), ("probes", probes)):
            (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.styles, self.words, self.open = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        (self.styles if "style" in self.open else self.words).append(data)

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]

    def shows(self, *numbers):
        """Whether these appear next to each other, with at most a short word between them."""
        return re.search(r"[^\d+]{1,5}?".join(map(re.escape, numbers)), self.text) is not None


def sections_of(file):
    """The HTML of each section of a page."""
    return file.read_text(encoding="utf-8").split("<section>")[1:]


def notes_of(file):
    return re.findall(r'<p class="note">(.*?)</p>', file.read_text(encoding="utf-8"))


def numbers_of(text):
    """Return the numbers in a text with their units: 1.63x, 95%, 500K."""
    return re.findall(r"[-+]?\d+(?:[.,]\d+)*[A-Za-z%]*", text)


def shape_of(text):
    """Return a text without its numbers and names, for comparison with another."""
    text = re.sub(r"[<=] (?=\d)", "", text)
    for number in sorted(numbers_of(text), key=len, reverse=True):
        text = text.replace(number, "#")
    return re.sub(r"anGPT|nGPT|DyT|GPT\+", "NAME", text)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Results of a comparison, its folder, and the files of its report."""
    folder = tmp_path_factory.mktemp("comparison")
    results = experiment(*(variant(name, speed, trials=trials_of(name)) for name, speed in SPEEDS.items()))
    write_logs(folder, results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 200)
        return results, folder, report.write(results, folder)


@pytest.fixture
def page(written):
    return Page(written[2][0].read_text(encoding="utf-8"))


# The summary of a comparison


def test_summary_names_best_values_at_an_edge_and_losses_that_rise():
    trials = trials_of("gpt+")
    text = summary(experiment(variant("gpt+", 1.0, trials=trials), variant("angpt", 1.6)))
    edge = summary(experiment(variant("gpt+", 1.0, trials=trials[2:]), variant("angpt", 1.6)))
    assert edge.startswith(text) and "500K" in edge.removeprefix(text)
    rising = with_losses("gpt+", (4.0, 4.1, 4.2), (4.3, 4.4, 4.5))
    results = experiment(rising, with_losses("angpt", (3.0, 3.1, 3.2), (2.9, 3.0, 3.1)), budgets=BUDGETS[:2])
    assert "GPT+" in summary(results).split(": ")[-1]


def test_summary_of_a_faster_method():
    results = pair(1.6)
    text, (baseline, method) = summary(results), results.variants
    losses = [item.losses(BUDGETS, SEEDS) for item in results.variants]
    exact = statistics.speedups(BUDGETS, *losses)[1]  # with 1.0M tokens no run of the baseline reaches the loss
    assert exact.low < exact.ratio < exact.high and exact.ratio == pytest.approx(1.6, rel=0.08)
    numbers = numbers_of(text)
    assert [number for number in numbers if re.fullmatch(r"[\d.]+x", number)] == [
        f"{value:.2f}x" for value in (exact.ratio, exact.low, exact.high)
    ]
    difference = statistics.paired_difference(losses[0][-1], losses[1][-1])
    assert f"{-difference.mean:.3f}" in numbers and f"{difference.p:.2g}" in numbers
    assert {"95%", "500K", "1.0M", "3", "2.1M"} <= set(numbers)
    assert all(labels.style_of(item.name).label in text for item in (baseline, method))


TWIN = variant("gpt+", 1.0)
TWINS = experiment(TWIN, Variant("angpt", {}, 2_100_000, (), TWIN.runs, TWIN.chosen))
ONE_BUDGET, ONE_SEED = {"budgets": BUDGETS[:1]}, {"seeds": (1,)}
ONE_DIVERGED, ALL_DIVERGED = [(1_000_000, 2)], [(budget, 1) for budget in BUDGETS]


@pytest.mark.parametrize(
    ("results", "scope", "speedup", "loss"),
    [
        (pair(20), {"250K", "1.0M", "3"}, ["4.00x"], ["0.374", "0.001"]),
        (pair(0.1), {"250K", "1.0M", "3"}, ["0.25x"], ["0.578", "0.001"]),
        (pair(0.6), {"95%", "1.0M", "3"}, ["0.60x", "0.55x", "0.64x"], ["0.098", "0.0026"]),
        (pair(1.0, noise=0.02), {"95%", "1.0M", "3"}, ["0.98x", "0.82x", "1.00x"], ["0.003", "0.74"]),
        (pair(1.6, **ONE_SEED), {"500K", "1", "1.0M"}, ["1.53x"], ["0.084"]),
        (pair(1.6, seeds=(1, 2)), {"95%", "1.0M", "2"}, ["1.61x", "1.46x", "1.77x"], ["0.084"]),
        (pair(1.6, **ONE_BUDGET), {"250K", "3"}, [], ["0.119", "0.0021"]),
        (pair(1.6, diverged=ONE_DIVERGED), {"95%", "500K", "1.0M", "3", "1", "9"}, ["1.63x", "1.49x", "1.80x"], []),
        (pair(1.6, diverged=ALL_DIVERGED), {"1.0M", "3", "9"}, [], []),
        (TWINS, {"95%", "1.0M", "3"}, ["1.00x", "0.92x", "1.00x"], []),
    ],
)
def test_summary_in_every_case(results, scope, speedup, loss):
    """The summary has the speedup with its interval and the loss difference with its p value, where they exist."""
    text = summary(results)
    numbers = numbers_of(text)
    assert scope | {"2.1M"} <= set(numbers)
    assert [number for number in numbers if number.endswith("x")] == speedup
    assert [number for number in numbers if re.fullmatch(r"0\.\d+", number)] == loss
    assert not re.search(r"\bnan\b|\binf\b", text)


@pytest.mark.parametrize(
    ("results", "names", "ratio"),
    [
        (experiment(variant("gpt+", 1), variant("angpt", 2), variant("dyt", 0.5)), {"anGPT", "GPT+"}, "2.00x"),
        (experiment(variant("gpt+", 1), variant("ngpt", 2)), {"nGPT", "GPT+"}, "2.01x"),
        (experiment(variant("angpt", 1), variant("gpt+", 0.5)), {"GPT+", "anGPT"}, "0.49x"),
    ],
)
def test_summary_compares_the_method_or_the_last_variant_with_the_baseline(results, names, ratio):
    text = summary(results)
    assert set(re.findall(r"anGPT|nGPT|DyT|GPT\+", text)) == names and ratio in text


@pytest.mark.parametrize("speedup", [0.1, 0.6, 1.0, 1.6, 20])
def test_one_seed_establishes_nothing(speedup):
    text = summary(pair(speedup, **ONE_SEED))
    assert not any(words in text for words in ("fewer tokens", "more tokens than GPT", "as many tokens"))


def test_bounds_on_both_sides_of_1_are_no_speedup():
    twin = variant("gpt+", 1.0)
    shift = dict(zip(BUDGETS, (0.5, 0.5, -0.5), strict=True))
    runs = tuple(replace(run, loss=run.loss + shift[run.tokens]) for run in twin.runs)
    text = summary(experiment(twin, replace(twin, name="angpt", runs=runs)))
    assert re.findall(r"[<>] [\d.]+x", text) == ["< 1.00x", "< 0.50x", "> 1.00x"]
    assert not re.search(r"\b(more|fewer) tokens", text)


@pytest.mark.parametrize(
    ("baseline", "losses", "bound"),
    [
        # The only finished run of GPT+ is longer, so a higher loss with fewer tokens says nothing, and the other way
        # round.
        (((math.inf,) * 3, (math.inf,) * 3, (2.0, 2.1, 2.2)), ((4.0, 4.1, 4.2),) * 2 + ((2.1, 2.2, 2.3),), "< 4.00x"),
        (((3.0, 3.1, 3.2), (math.inf,) * 3, (math.inf,) * 3), ((math.inf,) * 3,) * 2 + ((2.0, 2.1, 2.2),), "> 0.25x"),
    ],
)
def test_a_bound_on_the_other_side_of_1_is_no_speedup(baseline, losses, bound):
    text = summary(experiment(with_losses("gpt+", *baseline), with_losses("angpt", *losses)))
    assert bound in text and not re.search(r"\b(more|fewer) tokens", text)


def test_a_bound_whose_interval_contains_1_is_no_speedup():
    baseline = with_losses("gpt+", (3.0, 3.0, 3.0), (2.0, 2.6, 2.0), (2.1, 2.1, 2.7))
    text = summary(experiment(baseline, with_losses("angpt", (4.0, 4.1, 4.2), (3.9, 4.0, 4.1), (1.9, 2.5, 1.9))))
    assert "> 1.00x" in text and not re.search(r"(needs more|with fewer) tokens", text)


def test_the_summary_has_a_bound_at_a_longer_budget_that_contradicts_the_measured_speedup():
    baseline = with_losses("gpt+", (3.0, 3.01, 3.02), (2.0, 2.01, 2.02), (1.9, 1.91, 1.92))
    text = summary(experiment(baseline, with_losses("angpt", (3.1, 3.11, 3.12), (2.1, 2.11, 2.12), (1.1, 1.11, 1.12))))
    assert re.search(r"> 1\.00x with 1\.0M", text)


def test_the_summary_has_a_certain_bound_after_a_speedup_that_is_not_significant():
    baseline = with_losses("gpt+", (7.00, 7.13, 7.13), (6.88, 6.94, 7.07), (6.64, 6.75, 6.80))
    text = summary(experiment(baseline, with_losses("angpt", (7.33, 7.25, 7.21), (6.66, 6.85, 6.86), (6.3, 6.35, 6.5))))
    assert re.search(r"not? significant.*> 1\.00x with 1\.0M", text)


def test_summaries_of_different_cases_differ_in_wording():
    cases = [pair(1.6), pair(20), pair(0.1), pair(0.6), pair(1.0, noise=0.02), pair(1.6, **ONE_SEED)]
    cases += [pair(1.6, diverged=ONE_DIVERGED), pair(1.6, diverged=ALL_DIVERGED), TWINS]
    # With one budget the summary is about the loss alone: lower, higher, no difference.
    cases += [pair(speed, **ONE_BUDGET) for speed in (1.6, 0.6)]
    cases += [pair(1.0, noise=0.02, **ONE_BUDGET), pair(1.6, **ONE_BUDGET, **ONE_SEED)]
    shapes = [shape_of(summary(results)) for results in cases]
    assert len(set(shapes)) == len(shapes)
    assert shapes[0] == shape_of(summary(experiment(variant("gpt+", 1), variant("ngpt", 2))))
    assert shapes[3] == shape_of(summary(experiment(variant("angpt", 1), variant("gpt+", 0.5))))
    assert "lower" in shapes[-4] and "higher" in shapes[-3]  # which is the sign of the difference


@pytest.mark.parametrize(
    ("diverged", "speed", "figures"),
    [
        ([(1_000_000, seed) for seed in SEEDS], 20, {"2.00x", "250K", "500K"}),
        ([(250_000, 1)], 0.1, {"0.50x", "1.0M", "500K"}),
        (ALL_DIVERGED, 2, {"3", "9"}),
    ],
)
def test_summary_uses_only_the_finished_runs_of_the_baseline(diverged, speed, figures):
    text = summary(experiment(variant("gpt+", 1, diverged=diverged), variant("angpt", speed)))
    assert figures <= set(numbers_of(text))
    assert set(re.findall(r"[\d.]+x", text)) == {number for number in figures if number.endswith("x")}


def test_summary_compares_variants_of_the_same_recipe():
    def trained(architecture, recipe, speed):
        item = variant(f"{architecture}-{recipe}", speed)
        return replace(item, settings={**item.settings, "architecture": architecture})

    plain, angpt = trained("gpt+", "paper", 1.0), trained("angpt", "best", 1.7)
    recipes = {f"{name}-{recipe}": recipe for name in ("gpt+", "angpt") for recipe in ("paper", "best")}
    muon = replace(trained("gpt+", "best", 1.7), runs=angpt.runs)
    text = summary(experiment(plain, muon, angpt, recipes=recipes))
    assert "1.00x" in text and "1.7" not in text
    alone = summary(experiment(plain, angpt, recipes=recipes))
    assert "1.7" in alone and "recipe" in alone and "recipe" not in text
    assert "recipe" not in summary(experiment(plain, angpt))  # results of an earlier release


def test_summary_of_bounds():
    runs = [Run(budget, 1, loss, 1.0, 0.1, "r") for budget, loss in zip(BUDGETS[:2], (3.0, 1.0), strict=True)]
    shape = {"budgets": BUDGETS[:2], "seeds": (1,)}
    results = experiment(
        variant("gpt+", 1, **shape), Variant("angpt", {}, 2_100_000, (), tuple(runs), chosen(BUDGETS[:2])), **shape
    )
    text = summary(results)
    assert text.index("< 1.00x") < text.index("> 1.00x") and text.index("250K") < text.index("500K")


def with_losses(name, *losses):
    """A variant with these losses: a row for each budget, and a column for each seed."""
    runs = [
        Run(budget, seed, loss, 1.0, 0.1, "r")
        for budget, row in zip(BUDGETS, losses, strict=False)
        for seed, loss in zip(SEEDS, row, strict=True)
    ]
    return Variant(name, {}, 2_100_000, (), tuple(runs), chosen(BUDGETS[: len(losses)]))


def test_summary_of_a_bound_has_its_interval():
    shape = {"budgets": BUDGETS[:2], "seeds": SEEDS}
    baseline = with_losses("gpt+", (3.0, 3.1, 3.2), (2.0, 2.1, 2.2))
    text = summary(experiment(baseline, with_losses("angpt", (4.0, 4.1, 4.2), (3.0, 3.15, 3.3)), **shape))
    ratios = [float(ratio) for ratio in re.findall(r"([\d.]+)x", text)]
    assert "95%" in text and ratios[0] == 0.5 and max(ratios) > 0.5
    certain = summary(experiment(baseline, with_losses("angpt", (4.0, 4.1, 4.2), (3.9, 4.0, 4.1)), **shape))
    assert re.findall(r"([\d.]+)x", certain) == ["0.50"] and "95%" not in certain


def searched_at(*budgets):
    """Results in which GPT+ and anGPT searched their learning rate at these budgets."""
    trials = [trial for tokens in budgets for trial in trials_of("x", 0.004 * 250_000 / tokens, tokens)]
    return experiment(variant("gpt+", 1.0, trials=trials), variant("angpt", 1.6, trials=trials))


def test_summary_tells_at_which_budgets_the_learning_rates_were_tuned():
    everywhere, once, never = (summary(searched_at(*budgets)) for budgets in (BUDGETS, BUDGETS[:1], ()))
    assert len({everywhere, once, never}) == 3
    assert numbers_of(everywhere) == numbers_of(never) and "250K" in numbers_of(once)
    assert "tuned" in everywhere.split() and "untuned" in never.split()


# The report of a comparison


def test_page_is_self_contained(written, page):
    text = written[2][0].read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "http" not in text and "url(" not in "".join(page.styles) and "@import" not in text
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    for image in page.images():
        drawn = base64.b64decode(image["src"].partition("base64,")[2]).decode()
        assert drawn.startswith("<svg") and drawn.count("<svg") == 1 and "<script" not in drawn
        assert not re.findall(r'(?:href="|url\()(?!#)', drawn)


def test_page_has_every_section_and_chart(written, page):
    results, _, files = written
    sections = sections_of(files[0])
    assert [section.count("<img") for section in sections] == [2, 2, 1, 1, 6, 0, 0]
    assert len(set(re.findall(r"<h2>(.*?)</h2>", "".join(sections)))) == len(sections)
    assert summary(results) in page.text
    names = {path.stem for path in files[1:]}
    assert names == {
        *(
            "loss-tokens",
            "loss-seconds",
            "speedup-tokens",
            "speedup-seconds",
            "search-learning-rate",
            "training-curves",
        ),
        *("residual-by-layer", "residual-by-time", "row-norms", "moment-variance", "alpha-ngpt", "alpha-angpt"),
    }
    assert len(page.images()) == len(names) == len({image["src"] for image in page.images()})
    made = Page(sections[-1]).text
    assert all(word in made for word in (results.setup["command"], "500K", "GPT+ 5, nGPT 5, anGPT 5", "2.13"))


def test_alternative_texts_have_the_numbers_of_the_charts(written, page):
    results, _, _ = written
    texts = [image["alt"] for image in page.images()]
    assert all(len(text) > 20 and re.search(r"\d", text) for text in texts) and len(set(texts)) == len(texts)
    for item in results.variants:
        assert f"{item.losses([1_000_000], SEEDS).mean():.3f}" in texts[0]
    assert any(re.search(r"GPT\+ 1\D{1,5}801\b", text) for text in texts)


def test_numbers_on_the_page_are_those_of_the_statistics(written, page):
    results, _, _ = written
    baseline = results.baseline
    for item in results.variants:
        for losses in item.losses(BUDGETS, SEEDS):
            assert f"{losses.mean():.4f} ± {losses.std(ddof=1):.4f}" in page.text
        assert f"{item.parameters:,}" in page.text
        for over in results.variants:
            if item is over:
                continue
            losses = over.losses(BUDGETS, SEEDS), item.losses(BUDGETS, SEEDS)
            speed = over.seconds_per_step / item.seconds_per_step
            for point in statistics.speedups(BUDGETS, *losses):
                if 0 < point.ratio < math.inf and point.low > 0 and point.high < math.inf:
                    for scale in (1, speed):
                        ends = (point.ratio, point.low, point.high)
                        assert page.shows(*(f"{end * scale:.2f}x" for end in ends))
        if item is not baseline:
            difference = statistics.paired_difference(
                baseline.losses(BUDGETS, SEEDS)[-1], item.losses(BUDGETS, SEEDS)[-1]
            )
            assert page.shows(
                f"{difference.mean:+.4f}", f"{difference.low:+.4f}", f"{difference.high:+.4f}", f"{difference.p:.2g}"
            )
        small, _ = statistics.sensitivity(*zip(*((t.value, t.loss) for t in item.trials), strict=True))
        assert page.shows("5", "0.004", f"{small:+.3f}")


def test_figures_are_not_blank(written):
    for path in written[2][1:]:
        pixels = imread(path)[..., :3]
        assert pixels.shape[0] > 400 and pixels.shape[1] > 800
        assert (pixels < 0.9).any(-1).mean() > 0.01  # letters and lines, on white
        red, green, blue = np.moveaxis(pixels, -1, 0)
        assert (np.maximum(abs(red - green), abs(green - blue)) > 0.3).sum() > 300, path  # the variants' colours


def test_the_same_results_give_the_same_chart(written):
    assert loss_by_tokens(written[0]).svg() == loss_by_tokens(written[0]).svg()


@pytest.mark.parametrize("module", ["matplotlib", "scipy"])
def test_a_missing_extra_is_named(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as error:
        report.write(pair(1.5), tmp_path)
    assert module in str(error.value) and "antransformer[analysis]" in str(error.value)


def test_hostile_names_and_settings_are_text(tmp_path):
    hostile = "<script>alert('$x^{$ & \"q\"')</script>-->"
    variants = variant("gpt+", 1), variant(hostile, 1.5, trials=[Trial(hostile, 1.0, 2.0, "t", BUDGETS[0])])
    results = experiment(*variants, command=f"antransformer {hostile}", **{hostile: [hostile, 1]})
    files = report.write(results, tmp_path)
    text = files[0].read_text(encoding="utf-8")
    assert "<script" not in text and hostile in html.unescape(text)
    page = Page(text)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in Page(text.replace("alert", "")).tags}
    assert page.text.count("alert('$x^{$ & \"q\"')") > 5
    assert all(path.parent == tmp_path for path in files)
    for image in page.images():
        assert "<script" not in base64.b64decode(image["src"].partition("base64,")[2]).decode()


def test_report_has_a_search_at_every_budget(tmp_path):
    results = searched_at(*BUDGETS)
    files = report.write(results, tmp_path)
    assert {"search-learning-rate", "best-learning-rate"} <= {path.stem for path in files}
    page = Page(files[0].read_text(encoding="utf-8"))
    rates = [f"{0.004 * 250_000 / tokens:g}" for tokens in BUDGETS]
    for budget, rate in zip(("250K", "500K", "1.0M"), rates, strict=True):
        assert page.shows(budget, "5", rate) and f"{budget} (tuned)" in page.text
        assert f"{rate} at {budget}" in page.text
    drawn = next(image["alt"] for image in page.images() if image["alt"].count("250K") == 2)
    assert all(drawn.count(rate) == 2 for rate in rates)


def test_report_shows_the_last_pass_of_a_search_and_counts_the_runs_of_both(tmp_path):
    first = [Trial("lr", rate, loss, f"first-{rate}", BUDGETS[0]) for rate, loss in ((0.1, 2.0), (0.2, 3.0))]
    second = [Trial("lr", rate, loss, f"second-{rate}", BUDGETS[0], 2) for rate, loss in ((0.3, 1.8), (0.4, 1.7))]
    repeated = Trial("lr", 0.5, 1.9, "first-0.1", BUDGETS[0], 2)  # a run of the first pass, used again
    results = experiment(variant("gpt+", 1), variant("angpt", 1.5, trials=[*first, *second, repeated]))
    page = Page(report.write(results, tmp_path)[0].read_text(encoding="utf-8"))
    assert "Trials: GPT+ 0, anGPT 4." in page.text and page.shows("250K", "3", "0.4")
    assert [trial.value for trial in results.variants[1].trials_of("lr", BUDGETS[0])] == [0.3, 0.4, 0.5]


def test_report_calls_only_the_searched_budget_tuned(tmp_path):
    files = report.write(searched_at(BUDGETS[1]), tmp_path)
    text = Page(files[0].read_text(encoding="utf-8")).text
    assert "500K (tuned)" in text and "250K (rates tuned at 500K)" in text and "1.0M (rates tuned at 500K)" in text
    assert "250K (tuned)" not in text and "0.002 (found at 500K)" in text
    assert "best-learning-rate" not in {path.stem for path in files}
    for results in (searched_at(), Results.load(GOLDEN / "comparison")):
        untuned = Page(report.write(results, tmp_path)[0].read_text(encoding="utf-8")).text
        lr = results.baseline.settings["lr"]
        assert "(tuned)" not in untuned and f"{lr:g} (default)" in untuned


def test_report_without_logs_names_the_missing_files(tmp_path):
    files = report.write(pair(1.5), tmp_path)
    for name, note in zip(("metrics", "probes"), notes_of(files[0]), strict=True):
        assert f"{name}.jsonl" in note and "GPT+, anGPT" in note
    sections = sections_of(files[0])
    assert [section.count("<img") for section in sections] == [2, 2, 0, 0, 0, 0, 0] and "<table" not in sections[2]
    assert {path.stem for path in files} == {
        *("report", "loss-tokens", "loss-seconds", "speedup-tokens", "speedup-seconds")
    }


def test_report_with_logs_of_some_variants(tmp_path):
    results = pair(1.5)
    write_logs(tmp_path, results)
    next(tmp_path.glob("runs/gpt+*/probes.jsonl")).unlink()
    files = report.write(results, tmp_path)
    (note,) = notes_of(files[0])
    assert "probes.jsonl" in note and "GPT+" in note and "anGPT" not in note
    assert (tmp_path / "residual-by-layer.png") in files


@pytest.mark.parametrize(
    "shape", [{"budgets": BUDGETS[:1]}, {"seeds": (1,)}, {"budgets": BUDGETS[:1], "seeds": (1,)}], ids=str
)
def test_report_of_few_runs(shape, tmp_path):
    results = pair(1.5, **shape)
    text = Page(report.write(results, tmp_path)[0].read_text(encoding="utf-8")).text
    assert summary(results) in text and not re.search(r"\bnan\b|\binf\b", text)


def test_report_of_diverged_runs(tmp_path):
    every = [(budget, seed) for budget in BUDGETS for seed in SEEDS]
    results = experiment(
        variant("gpt+", 1, diverged=every[:1]),
        variant("dyt", 1, diverged=every),
        variant("angpt", 1.5, diverged=every[-1:]),
    )
    text = Page(report.write(results, tmp_path)[0].read_text(encoding="utf-8")).text
    for name, number in (("GPT+", 1), ("DyT", 9), ("anGPT", 1)):
        assert re.search(rf"\b{re.escape(name)} {number}\D{{1,4}}9\b", summary(results))
    assert summary(results) in text and len(re.findall(r"\b3\D{1,4}3 diverged", text)) == len(BUDGETS)
    assert not re.search(r"\bnan\b|\binf\b", text)


@pytest.mark.parametrize(
    ("number", "text"),
    [(250_000, "250K"), (1e6, "1.0M"), (1_250_000, "1.25M"), (999_999, "1.0M"), (12, "12"), (2.5e9, "2.5B")],
)
def test_counts_are_short(number, text):
    assert labels.format_count(number) == text


# Ablation


def ablated(name, difference, seeds=SEEDS):
    generator = np.random.default_rng(sum(name.encode()))
    losses = [2.2 + 0.01 * seed + difference + 0.0005 * generator.normal() * (difference != 0) for seed in seeds]
    runs = tuple(
        Run(500_000, seed, loss, 1.4, 0.05, f"{name}-{seed}") for seed, loss in zip(seeds, losses, strict=True)
    )
    return Variant(name, {"lr": 0.004, "model.ablation": name}, 2_100_000, (), runs, chosen((500_000,)))


def ablation(*variants, seeds=SEEDS):
    return experiment(ablated("default", 0, seeds), *variants, kind="ablate", budgets=(500_000,), seeds=seeds)


def test_the_rules_of_an_ablation_are_not_about_speedups(tmp_path):
    experiments = ablation(ablated("a", 0.1)), pair(1.6)
    pages = [Page(report.write(results, tmp_path)[0].read_text(encoding="utf-8")).text for results in experiments]
    assert ["extrapolated" in page for page in pages] == [False, True]
    assert ["Seconds" in page for page in pages] == [False, True]


SUITE = {"no-lerp": 0.05, "<b>-x2": math.inf, "strict": -0.04, "warm-up": 0.0001, "all-x0.5": 5.3}


def test_summary_of_an_ablation():
    more = {"no-bound": 0.06, "no-norm": 0.07, "stricter": -0.05} | dict.fromkeys("abcd", 0.0)
    several = summary(ablation(*(ablated(name, difference) for name, difference in (SUITE | more).items())))
    counts = {"12", "4", "2", "5", "1"}  # all; worse, better, neither, diverged
    assert counts | {"3", "500K", "2.1M", "+5.300"} <= set(numbers_of(several))
    assert re.search(r"\b4\D*worse\b", several) and re.search(r"\b2\D*better\b", several)
    assert re.search(r"\b1\D*diverged\b", several) and "all-x0.5" in several

    variants = ablated("a", 0.1, (1,)), ablated("b", -0.1, (1,)), ablated("c", 0.2, (1,))
    one_seed = summary(ablation(*variants, seeds=(1,)))
    assert {"3", "2", "1", "0", "500K", "2.1M", "+0.200"} <= set(numbers_of(one_seed))

    better = summary(ablation(ablated("a", -0.1, (1,)), seeds=(1,)))
    assert not [number for number in numbers_of(better) if number.startswith(("+", "-"))]

    diverged = ablated("default", math.inf), ablated("a", 0.1)
    diverged_baseline = summary(experiment(*diverged, kind="ablate", budgets=(500_000,)))
    assert set(numbers_of(diverged_baseline)) == {"3", "500K", "2.1M"}

    all_diverged = summary(ablation(ablated("a", math.inf)))
    assert not [number for number in numbers_of(all_diverged) if number.startswith("+")]
    assert re.search(r"\b1\D*diverged\b", all_diverged)
    assert len({shape_of(text) for text in (several, one_seed, diverged_baseline, all_diverged)}) == 4


def test_holm_corrects_for_the_number_of_tests():
    assert statistics.holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True
    )
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_summary_of_an_ablation_tells_an_increase_that_is_not_significant():
    noisy = ablated("a", 0.02)
    runs = tuple(replace(run, loss=run.loss + noise) for run, noise in zip(noisy.runs, (-0.2, 0.3, -0.1), strict=True))
    texts = [summary(ablation(item, ablated("b", -0.001))) for item in (replace(noisy, runs=runs), noisy)]
    assert ["not significant" in text for text in texts] == [True, False]
    assert all("+0.0" in text for text in texts)


def test_page_of_an_ablation(tmp_path):
    results = ablation(*(ablated(name, difference) for name, difference in SUITE.items()))
    files = report.write(results, tmp_path)
    assert [path.name for path in files] == ["report.html", "ablation.png"]
    page, sections = Page(files[0].read_text(encoding="utf-8")), sections_of(files[0])
    assert [section.count("<img") for section in sections] == [1, 0, 0] and "<b>-x2" in page.text
    assert results.setup["command"] in Page(sections[-1]).text
    default = results.baseline.losses([500_000], SEEDS)[0]
    others = [item.losses([500_000], SEEDS)[0] for item in results.variants[1:]]
    differences = statistics.pooled_differences(default, others)
    for difference, p in zip(differences, statistics.holm([difference.p for difference in differences]), strict=True):
        if math.isfinite(difference.mean):
            shown = "< 0.001" if p < 0.001 else f"= {p:.2g}"
            assert page.shows(f"{difference.mean:+.4f}", f"{difference.low:+.4f}", f"{difference.high:+.4f}", shown)
    for text in ("no-lerp +0.050", "<b>-x2 diverged", "strict -0.040"):
        assert text in page.images()[0]["alt"]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', sections[1])
    cells = {
        html.unescape(name): re.findall(r'<td class="text"[^>]*><span>(.*?)</span></td>', row) for name, row in rows
    }
    assert all(html.unescape(cells[name][1]) == f"ablation {name}" for name in SUITE)
    outcomes = {name: cells[name][0] for name in SUITE}
    unclear = outcomes.pop("warm-up")
    assert outcomes == {"no-lerp": "worse", "<b>-x2": "diverged", "strict": "better", "all-x0.5": "worse"}
    assert unclear and unclear not in outcomes.values()


# In a browser

WIDTHS, CHART = (390, 768, 1280), 400
MEASURE = """
window.onload = () => {
  document.body.dataset.measured = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(part => part.open = true);
    return {
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      images: [...page.images].map(image => image.naturalWidth > 0 && image.getBoundingClientRect().width),
      cut: [...page.querySelectorAll(".scroll, td, th, pre, dd, li, p")].filter(
        part => part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).position !== "absolute"
        && part.clientWidth).map(part => part.outerHTML.slice(0, 200)),
      columns: new Set([...page.images].map(image => image.getBoundingClientRect().left)).size,
    };
  }));
};
"""


@pytest.fixture(scope="module")
def chromium():
    """Path of Chromium or Chrome; continuous integration must have one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        assert not os.environ.get("ANTRANSFORMER_REQUIRE_CHROMIUM"), f"none of {', '.join(names)} is installed"
        pytest.skip(f"none of {', '.join(names)} is installed")
    return browser


def browse(chromium, folder, document, *options):
    wrapper = folder / "wrapper.html"
    wrapper.write_text(document, encoding="utf-8")
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command = [chromium, *fixed, f"--user-data-dir={folder / 'profile'}", *options, wrapper.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def framed(page, script=""):
    """Return a document with the page at each width side by side, and its first chart."""
    text = page.read_text(encoding="utf-8")
    frames = "".join(f'<iframe width={width} height=3000 srcdoc="{html.escape(text)}"></iframe>' for width in WIDTHS)
    chart = f'<img width={CHART} src="{Page(text).images()[0]["src"]}">'
    head = '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    style = "<style>body{margin:0;display:flex;align-items:start}iframe{border:0;flex:none}</style>"
    return f"{head}{style}<script>{script}</script><body>{frames}{chart}</body>"


def test_page_fits_a_phone_and_a_wide_screen(chromium, written, tmp_path):
    shown = browse(chromium, tmp_path, framed(written[2][0], MEASURE), "--window-size=2500,3000", "--dump-dom")
    phone, tablet, wide = json.loads(html.unescape(re.search(r'data-measured="(.*?)"', shown)[1]))
    for layout in (phone, tablet, wide):
        assert layout["overflow"] == 0 and layout["cut"] == []
        assert len(layout["images"]) == len(written[2]) - 1 and all(layout["images"])
    assert phone["columns"] == 1 and min(phone["images"]) > 330
    assert wide["columns"] == 2 and min(wide["images"]) > 500


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_drawn(chromium, written, tmp_path, scheme):
    screenshot, size = tmp_path / "page.png", (sum(WIDTHS) + CHART, 3000)
    setting = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    window = "--window-size={},{}".format(*size)
    browse(chromium, tmp_path, framed(written[2][0]), window, setting, f"--screenshot={screenshot}")
    pixels = np.round(imread(screenshot)[..., :3] * 255).astype(int)
    assert pixels.shape[:2] == size[::-1]
    ink = figure_style.INK if scheme == "light" else figure_style.DARK[figure_style.INK]
    for part in np.split(pixels, np.cumsum(WIDTHS), axis=1):
        assert (part.mean() > 200) if scheme == "light" else (part.mean() < 60)
        assert count_pixels(part, ink) > 60
        for name in SPEEDS:
            assert count_pixels(part, labels.style_of(name).colour) > 60, name


def test_variants_have_different_styles_with_and_without_muon():
    suffixes = ("", "-muon", "-normuon")
    names = [*(name + suffix for name in ("gpt+", "ngpt", "angpt") for suffix in suffixes), "gpt-muon"]
    styles = [labels.style_of(name) for name in names]
    for attribute in ("label", "colour", "marker"):
        assert len({getattr(style, attribute) for style in styles}) == len(names)


def count_pixels(pixels, colour):
    """Number of pixels with a colour."""
    return (abs(pixels - [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).max(-1) < 12).sum()
