import pytest

from antransformer.reporting.labels import finite_or_diverged, format_count, format_value, slug, style_of, time_unit


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (999, "999"), (999.6, "1.0K"), (250_000, "250K"), (999_600, "1.0M"), (1.25e6, "1.25M"), (15e12, "15T")],
)
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4096, "4,096"),
        (True, "True"),
        ([0.9, 0.95], "0.9, 0.95"),
        ({"width": 1024, "layers": 2}, "width 1,024, layers 2"),
    ],
)
def test_values_of_settings(value, text):
    assert format_value(value) == text


def test_losses_that_are_not_finite_have_diverged():
    assert [finite_or_diverged(value) for value in (1.23456, float("nan"), float("inf"))] == ["1.235"] + [
        "diverged"
    ] * 2


def test_units_of_time():
    assert [time_unit(seconds)[0] for seconds in (240, 241, 4 * 3600 + 1)] == ["seconds", "minutes", "hours"]


def test_unknown_variants_keep_their_name():
    assert style_of("mine").label == "mine" and style_of("angpt").label == "anGPT"
    assert slug("GPT+ (Muon)") == "gpt-muon-"


def test_variants_of_the_recipes_differ_in_colour_and_marker():
    names = [f"{name}{recipe}" for name in ("gpt+", "angpt") for recipe in ("", "-paper", "-best")]
    styles = [style_of(name) for name in [*names, "angpt-paper-muon"]]
    assert len({style.colour for style in styles}) == len({style.label for style in styles}) == 7
    for name in ("gpt+", "angpt"):
        assert len({style_of(f"{name}{recipe}").marker for recipe in ("", "-paper", "-best")}) == 3
