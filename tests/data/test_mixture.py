"""Mixtures of data folders: which windows they hold, at every position, on every rank, after every change."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from antransformer.data import Dataset, prepare
from antransformer.data.batches import ShuffledWindows
from antransformer.data.mixed_windows import MixedWindows, Pattern, Stage
from antransformer.data.mixture import PERIOD, open_mixture, quotas
from antransformer.data.mixture_spec import Part, absolute_stage, format_mixture, parse_mixture, parse_stage
from antransformer.errors import ConfigError, DataError
from antransformer.training.config import normalize_settings
from helpers.messages import mentions

CONTEXT = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three corpora of different sizes, a copy of the first, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("sources")
    for name, characters in (("a", 4000), ("b", 1500), ("c", 900)):
        (root / f"{name}.txt").write_text(name * characters)
        (root / f"{name}-val.txt").write_text(name * 100)
        prepare([root / f"{name}.txt"], root / name, val_inputs=[root / f"{name}-val.txt"])
    shutil.copytree(root / "a", root / "copy")
    (root / "text.txt").write_text("to be or not to be, that is the question. " * 100)
    prepare([root / "text.txt"], root / "bpe", bpe_vocab_size=280)
    return root


@pytest.fixture(scope="module")
def sources(folders):
    """Windows of the three corpora."""
    return [ShuffledWindows(Dataset.open(folders / name).split("train"), CONTEXT, seed=3) for name in "abc"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data/web", [("data/web", 1)]),
        ("web:0.7 code:0.2 books:0.1", [("web", 0.7), ("code", 0.2), ("books", 0.1)]),
        ("web:3 code:1e-3", [("web", 3), ("code", 0.001)]),
        ("'my web:1' c:1", [("my web", 1), ("c", 1)]),
        ("'my web'", [("my web", 1)]),
        ("web:2", [("web", 2)]),
        ("C:/data", [("C:/data", 1)]),
        ("it's", [("it's", 1)]),
        ("", [("", 1)]),
    ],
)
def test_mixtures_are_read_and_written(text, parts):
    parsed = parse_mixture(text)
    assert parsed == tuple(Part(*part) for part in parts)
    if len(parts) > 1:
        assert parse_mixture(format_mixture(parsed)) == parsed


def test_words_are_one_setting(tmp_path):
    def data(value):
        return normalize_settings({"data": value}, "settings")["data"]

    assert data(["web:0.7", "my books:0.3"]) == "web:0.7 'my books:0.3'" == data("web:0.7 'my books:0.3'")
    assert data(["my folder"]) == data([tmp_path / "my folder"])[len(str(tmp_path)) + 1 :] == "my folder"
    assert parse_stage(normalize_settings({"data_from": [0.8, "my books"]}, "")["data_from"]) == (
        0.8,
        (Part("my books"),),
    )
    for wrong in ([], [["web:1"]], {"web": 1}, ["web:1", ""], 3):
        with pytest.raises(ConfigError) as error:
            data(wrong)
        assert mentions(error.value, "settings: data")


def test_an_existing_folder_is_one_source_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web:0.7 code:0.3").mkdir()
    assert parse_mixture("web:0.7 code:0.3") == (Part("web:0.7 code:0.3"),)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("web:0.7 code", "code"),
        ("web code", "web code"),
        ("web:0 code:1", "web 0"),
        ("web:-1 code:2", "web -1"),
        ("web:nan code:1", "web nan"),
        ("web:1e300 code:1", "web 1e+300"),
        ("web:1 web:2", "web twice"),
        (":1 a:2", ":1"),
    ],
)
def test_wrong_mixtures_are_refused(text, parts):
    with pytest.raises(ConfigError) as error:
        parse_mixture(text)
    assert mentions(error.value, "data", *parts.split())
    with pytest.raises(ConfigError) as error:
        parse_stage(f"0.5 {text}")
    assert mentions(error.value, "data_from")


@pytest.mark.parametrize("text", ["", "0.8", "1 web", "0 web", "-1 web", "nan web", "web 0.8", "web:0.5 code:0.5"])
def test_a_stage_needs_a_fraction_and_data(text):
    with pytest.raises(ConfigError) as error:
        parse_stage(text)
    assert mentions(error.value, "data_from", repr(text))


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my web").mkdir()
    assert absolute_stage("0.25 'my web:3' python-stdlib:0.1") == f"0.25 '{tmp_path}/my web:3' python-stdlib:0.1"
    with pytest.raises(ConfigError) as error:
        parse_mixture("'my web:1' './my web:1'")
    assert mentions(error.value, "my web", "twice")


def test_the_digest_covers_sources_weights_and_stages_but_not_paths(folders, tmp_path):
    def digest(first, second=None, root=folders):
        return open_mixture(first, second, lambda name: Dataset.open(root / name)).digest

    shutil.copytree(folders, tmp_path / "moved")
    same = digest("a:0.7 b:0.3", "0.5 c")
    assert same == digest("a:7 b:3", "0.5 c:2", root=tmp_path / "moved")
    others = [("a:0.7 b:0.3", None), ("a:0.6 b:0.4", "0.5 c"), ("a:0.7 b:0.3", "0.4 c"), ("b:0.3 a:0.7", "0.5 c")]
    assert len({same, *(digest(*other) for other in others)}) == 5
    assert digest("a") == digest("a:3") == Dataset.open(folders / "a").digest


@pytest.mark.parametrize("other", ["copy", "bpe"])
def test_sources_that_do_not_fit_together_are_refused(folders, other):
    with pytest.raises(DataError) as error:
        open_mixture(f"a:1 {other}:1", None, lambda name: Dataset.open(folders / name))
    assert mentions(error.value, folders / "a", folders / other)


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
