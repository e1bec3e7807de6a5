"""Config files: YAML with the settings of a run, written by users, shipped, or saved in a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from antransformer.errors import ConfigError
from antransformer.files import read_text
from antransformer.renamed import upgrade_settings
from antransformer.settings import nearest, shown

CONFIG_VERSION = 2  # version 1 has the names on the left of the tables in renamed.py


def read_config(name: str) -> dict[str, Any]:
    """Settings of a YAML file, such as the ``config.yaml`` of a run, or of a shipped config by its name.

    Raises:
        ConfigError: there is no such file, or it is not a config.
    """
    shipped = shipped_configs()
    if name in shipped:
        return read_settings(shipped[name])
    if Path(name).is_dir():
        raise ConfigError(f"{name} is a folder: give a config file, such as the config.yaml of a run")
    if not Path(name).is_file():
        raise ConfigError(f"no config file {name}{nearest(name, shipped) or ': the package has ' + ', '.join(shipped)}")
    return read_settings(Path(name))


def shipped_configs() -> dict[str, Path]:
    """Paths of the configs that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))}


def read_settings(path: Path, default_version: int = CONFIG_VERSION) -> dict[str, Any]:
    """Settings of a YAML file under their present names, without the ``version`` of the format.

    Args:
        path: the file.
        default_version: version of a file that has no ``version`` key. A user's file needs none.

    Raises:
        ConfigError: the file cannot be read, or was written by a newer release.
    """
    settings = read_yaml(path)
    version = settings.pop("version", default_version)
    if type(version) is not int or version not in (1, CONFIG_VERSION):
        raise ConfigError(
            f"{path}: version {shown(version)} is not supported, this release reads up to {CONFIG_VERSION}: "
            "update antransformer"
        )
    return upgrade_settings(settings) if version == 1 else settings


def format_settings(settings: Mapping[str, Any]) -> str:
    """YAML text of settings, as ``read_settings`` reads it."""
    return yaml.safe_dump({"version": CONFIG_VERSION, **settings}, sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        content = _Loader(read_text(path)).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    except Exception as error:  # malformed scalars and deep nesting raise exceptions of many classes
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        position = f" near line {line + 1}" if line is not None else ""
        problem = getattr(error, "problem", None) or "syntax error"
        raise ConfigError(f"{path}: not valid YAML{position}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: must hold settings as key: value")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses keys that appear twice, of which YAML would use the last, and aliases of lists and mappings.

    A few lines of nested aliases expand to more than memory holds.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} appears twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, "an alias of more than a single value")
        return node
