"""Print a script with which a shell completes verbs, options and values.

The script is static, so Tab starts no Python. Print it again after an update of the package. Create its folder first
(mkdir -p).

examples:
  antransformer completion bash > ~/.local/share/bash-completion/completions/antransformer
  antransformer completion zsh > ~/.zfunc/_antransformer
  antransformer completion fish > ~/.config/fish/completions/antransformer.fish
"""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from antransformer.cli.options import SETTING, Parser
from antransformer.extras import require
from antransformer.models.config import PRESETS, ModelConfig
from antransformer.training.config import TrainConfig

USAGE = "antransformer completion SHELL"
SHELLS = ("bash", "zsh", "fish", "tcsh")
PATHS = ("DATA", "DIR", "FILE", "FOLDER", "INPUT", "PATH", "RESULTS", "RUN")  # metavars
PATH_SETTINGS = ("data", "init")


def add_arguments(parser: Parser) -> None:
    """Add the name of the shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(parsed: argparse.Namespace) -> None:
    """Print the script.

    Raises:
        MissingExtraError: shtab is not installed.
    """
    shtab, choices = require("shtab", "completion"), choices_of_settings()
    for action in all_actions(parsed.parser):
        name = action.dest.removeprefix(SETTING)
        if action.metavar in PATHS or name in PATH_SETTINGS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest.startswith(SETTING) and name in choices:
            action.choices = choices[name]
    print(shtab.complete(parsed.parser, shell=parsed.shell))


def all_actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Options and arguments of all verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from all_actions(verb)


def choices_of_settings() -> Mapping[str, list[str]]:
    """Permitted values of settings by dotted name."""
    from antransformer.models import registry

    fields: dict[str, Any] = {item.name: item for item in dataclasses.fields(TrainConfig)}
    fields |= {f"model.{item.name}": item for item in dataclasses.fields(ModelConfig)}
    choices = {name: list(item.metadata.get("choices", ())) for name, item in fields.items()}
    choices |= {"preset": list(PRESETS), "architecture": list(registry.names())}
    return {name: values for name, values in choices.items() if values}
