"""Declared settings: conversion of a user's values, and checks of ranges and choices."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antransformer.errors import ConfigError
from antransformer.settings import check_settings, convert, read_count, setting
from helpers.messages import mentions


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = setting("size", 4, ge=1, le=2_000)
    share: float = setting("share", 0.5, gt=0, lt=1)
    seed: int = setting("seed", 0, ge=0, lt=2**40)
    color: str = setting("color", "red", choices=("red", "blue"))
    limit: float | None = setting("limit", None, gt=0)


@pytest.mark.parametrize(
    "values", [{"size": 1}, {"size": 2_000}, {"share": 1e-9}, {"color": "blue"}, {"limit": None}, {"limit": 3}]
)
def test_values_in_range_are_accepted(values):
    check_settings(Config(**values))


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"size": 0}, "size 1 2,000 0"),
        ({"size": 2_001}, "size 1 2,000 2001"),
        ({"size": 4.0}, "size 4.0"),
        ({"size": True}, "size True"),
        ({"size": None}, "size None"),
        ({"share": 0}, "share 0 1"),
        ({"share": 1.0}, "share 0 1 1.0"),
        ({"share": float("nan")}, "share 0 1 nan"),
        ({"share": "0.5"}, "share '0.5'"),
        ({"seed": 2**40}, "seed 0 2^40 1099511627776"),
        ({"color": "green"}, "color red blue 'green'"),
        ({"limit": -1}, "limit 0 -1"),
    ],
)
def test_values_out_of_range_are_refused(values, facts):
    with pytest.raises(ConfigError) as error:
        check_settings(Config(**values))
    assert mentions(error.value, *facts.split())


def test_values_are_converted_from_text():
    assert convert("60", int, "--x") == 60 and convert("2e-3", float | None, "--x") == 2e-3
    assert convert("true", bool, "--x") is True and convert(None, float | None, "--x") is None
    for value, hint in ((None, float), ("x", int), ("1.5", int), ("inf", float), (1, str), ("yes", bool)):
        with pytest.raises(ConfigError) as error:
            convert(value, hint, "--name")
        assert mentions(error.value, "--name") and str(value) in str(error.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("60K", 60_000),
        ("2.5B", 2_500_000_000),
        ("1e6", 10**6),
        ("4_096", 4096),
        (17, 17),
        ("1t", 10**12),
        ("0.5m", 500_000),
    ],
)
def test_counts(text, count):
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["2,5B", "1,00K", ",5M", "1000,000", "5,M"])
def test_commas_only_separate_thousands(text):
    assert read_count("1,234,500") == read_count("1,234.5K") == 1_234_500
    with pytest.raises(ValueError, match=text):
        read_count(text)


@given(st.integers(0, 2**63 - 1))
def test_every_integer_is_a_count(number):
    assert read_count(str(number)) == read_count(number) == number


@given(st.integers(1, 9999), st.sampled_from([1, 2, 3]), st.sampled_from("KMBT"))
def test_every_decimal_with_an_integer_value_is_a_count(digits, places, suffix):
    count = digits * {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix] // 10**places
    text = f"{digits // 10**places}.{digits % 10**places:0{places}}{suffix}"
    assert read_count(text) == count
