"""Mixtures of data folders: which windows they hold, at every position, on every rank, after every change."""

from collections import Counter

import numpy as np
import pytest
import torch

from antransformer.data import Dataset, prepare
from antransformer.data.batches import ShuffledWindows
from antransformer.data.mixture import (
    PERIOD,
    MixedWindows,
    Part,
    Pattern,
    Stage,
    format_mixture,
    parse_mixture,
    quotas,
)
from antransformer.errors import ConfigError
from helpers.messages import mentions

CONTEXT = 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Windows of three corpora of different sizes."""
    root = tmp_path_factory.mktemp("sources")
    windows = []
    for name, characters in (("a", 4000), ("b", 1500), ("c", 900)):
        (root / f"{name}.txt").write_text(name * characters)
        (root / f"{name}-val.txt").write_text(name * 100)
        prepare([root / f"{name}.txt"], root / name, val_inputs=[root / f"{name}-val.txt"])
        windows.append(ShuffledWindows(Dataset.open(root / name).split("train"), CONTEXT, seed=3))
    return windows


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data/web", [("data/web", 1.0)]),
        ("web:0.7 code:0.2 books:0.1", [("web", 0.7), ("code", 0.2), ("books", 0.1)]),
        ("web:3 code:1", [("web", 0.75), ("code", 0.25)]),
        ("'my web:1' c:1", [("my web", 0.5), ("c", 0.5)]),
        ("a folder with spaces", None),
        ("C:/data", [("C:/data", 1.0)]),
    ],
)
def test_mixtures_are_read_and_written(text, parts):
    if parts is None:
        with pytest.raises(ConfigError) as error:
            parse_mixture(text)
        assert mentions(error.value, "folder" if "folder" in str(error.value) else "a")
        return
    parsed = parse_mixture(text)
    assert parsed == tuple(Part(source, pytest.approx(weight)) for source, weight in parts)
    assert parse_mixture(format_mixture(parsed)) == tuple(Part(p.source, pytest.approx(p.weight)) for p in parsed)


def test_an_existing_folder_is_one_source_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web:0.7 code:0.3").mkdir()
    assert parse_mixture("web:0.7 code:0.3") == (Part("web:0.7 code:0.3", 1.0),)


@pytest.mark.parametrize(
    "text", ["web:0.7 code", "web:0 code:1", "web:-1 code:2", "web:nan code:1", "web:1 web:2", ":1 a:2"]
)
def test_wrong_mixtures_are_refused(text):
    with pytest.raises(ConfigError):
        parse_mixture(text)


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (1 - 1e-9, 1e-9), (5.0, 3.0)])
def test_quotas_are_the_weights_to_one_position(weights):
    counts = quotas(weights)
    assert counts.sum() == PERIOD and counts.min() >= 1
    assert np.abs(counts / PERIOD - np.array(weights) / sum(weights)).max() <= 1 / PERIOD


def test_the_pattern_counts_every_source_in_order():
    pattern = Pattern((0.7, 0.2, 0.1), seed=5)
    positions = np.arange(2 * PERIOD + 123)
    where, numbers = pattern.locate(positions)
    for source in range(3):
        assert numbers[where == source].tolist() == list(range(int((where == source).sum())))
    assert pattern.counts(len(positions)).tolist() == np.bincount(where).tolist()
    shuffled = np.random.default_rng(0).permutation(positions)
    assert (pattern.locate(shuffled)[0] == where[shuffled]).all()
    first, second = where[:PERIOD], where[PERIOD : 2 * PERIOD]
    assert (first != second).any()
    for part in np.split(first, 10):  # no long stretch without a source
        assert abs((part == 0).mean() - 0.7) < 0.06


def windows_of(mixed, steps, batch, world_size):
    """Bytes of every window of a run, in order."""
    batches = [mixed.batch(step, batch, rank, world_size) for step in range(steps) for rank in range(world_size)]
    return torch.cat([tokens for tokens, _ in batches])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_windows_do_not_depend_on_the_number_of_ranks(sources, world_size):
    mixed = MixedWindows(sources, [Stage(0, (0.6, 0.3, 0.1))], seed=1)
    single = windows_of(MixedWindows(sources, [Stage(0, (0.6, 0.3, 0.1))], seed=1), 20, 8, 1)
    assert torch.equal(windows_of(mixed, 20, 8, world_size), single)
    counts = Counter(single[:, 0].tolist())
    assert [round(counts[ord(letter)] / 160, 1) for letter in "abc"] == [0.6, 0.3, 0.1]


def test_no_window_of_a_source_repeats_within_its_epoch_across_stages(sources):
    stages = [Stage(0, (0.5, 0.5, 0.0)), Stage(101, (0.2, 0.3, 0.5)), Stage(177, (0.0, 0.4, 0.6))]
    mixed = MixedWindows(sources, stages, seed=1)
    where, numbers = mixed.locate(np.arange(400))
    assert set(where[:101]) == {0, 1} and set(where[177:]) == {1, 2}
    for source in range(3):
        assert numbers[where == source].tolist() == list(range(int((where == source).sum())))


def test_a_batch_holds_the_windows_of_its_positions(sources):
    mixed = MixedWindows(sources, [Stage(0, (1.0, 1.0, 1.0))], seed=2)
    tokens, targets = mixed.batch(3, 12)
    where, numbers = mixed.locate(36 + np.arange(12))
    for row, (source, number) in enumerate(zip(where, numbers, strict=True)):
        expected = sources[source].windows_at(np.array([number]))
        assert torch.equal(tokens[row], expected[0][0]) and torch.equal(targets[row], expected[1][0])
