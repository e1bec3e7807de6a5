"""Config files: shipped, written by a user, or saved by a run."""

import errno
import os

import pytest
import yaml

from antransformer.errors import ConfigError
from antransformer.training.config import resolve_config, to_mapping
from antransformer.training.config_files import format_settings, read_config, read_yaml, shipped_configs
from antransformer.training.optimizer_registry import OPTIMIZERS
from helpers.messages import mentions


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_resolves(name):
    config = resolve_config(read_config(name), vocab_size=4096)
    assert config.steps > 0


def test_there_are_shipped_configs():
    assert "demo" in shipped_configs()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_config_of_a_run_gives_an_equal_config(tmp_path, optimizer):
    config = resolve_config({"optimizer": optimizer, "context": 64, "seed": 3}, vocab_size=300)
    (tmp_path / "config.yaml").write_text(format_settings(to_mapping(config)))
    assert resolve_config(read_config(str(tmp_path / "config.yaml")), vocab_size=1) == config


def test_a_config_of_version_1_has_its_settings_renamed(tmp_path):
    (tmp_path / "old.yaml").write_text("version: 1\nclip: 0.5\nparallel: shard\nmodel: {head_width: 32, nu_p: heads}\n")
    settings = read_config(str(tmp_path / "old.yaml"))
    assert settings == {"grad_clip": 0.5, "parallel": "fsdp", "model": {"head_dim": 32}}


@pytest.mark.parametrize("version", [3, 0, "2", True, None, [2]])
def test_other_versions_are_refused(tmp_path, version):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"version": version, "lr": 1e-3}))
    with pytest.raises(ConfigError) as error:
        read_config(str(tmp_path / "x.yaml"))
    assert mentions(error.value, tmp_path / "x.yaml", 2) and repr(version) in str(error.value)


def test_a_missing_config_is_refused_with_the_shipped_ones():
    with pytest.raises(ConfigError) as error:
        read_config("nowhere.yaml")
    assert mentions(error.value, "nowhere.yaml", "demo")


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("a: [1", "YAML 1"),  # line 1
        ("- 1", ""),
        ("1: 2", ""),
        ("[" * 20_000, "YAML"),
        ("a: !!timestamp x", "YAML"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ],
)
def test_malformed_yaml_is_refused_and_never_executed(tmp_path, content, facts):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path / "x.yaml")
    assert mentions(error.value, tmp_path / "x.yaml", *facts.split())
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path / "none.yaml")
    assert mentions(error.value, tmp_path / "none.yaml") and os.strerror(errno.ENOENT) in str(error.value)
