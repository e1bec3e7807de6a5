"""Command-line options made from config dataclasses, so that a setting is declared once."""

import argparse
import dataclasses
import typing
from typing import Any, NoReturn

from antransformer import renamed
from antransformer.errors import ConfigError, UsageError
from antransformer.settings import Count, convert, nearest


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the paragraphs of a verb's description, and leaves room for option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in paragraphs)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and which suggests the nearest option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def refuse(self, word: str) -> NoReturn:
        """Complain of an argument that nothing took.

        Raises:
            UsageError: always.
        """
        name = word.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        if not name.startswith("-"):
            raise UsageError(f"unexpected argument {word} (see {self.prog} --help)")
        if name in renamed.OPTIONS:
            raise UsageError(f"{name} is now {renamed.OPTIONS[name]} (see {self.prog} --help)")
        raise UsageError(f"unknown option {name}{nearest(name, known)} (see {self.prog} --help)")


def add_config(group: Any, config: type, prefix: str = "", only: tuple[str, ...] = ()) -> None:
    """An option for each field of a dataclass that has a help text; values stay text until the config is resolved."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        if "help" not in item.metadata or (only and item.name not in only):
            continue
        text = item.metadata["help"].replace("%", "%%")
        if item.default is not None and item.default is not False and "(default" not in text:
            text += f" (default {item.default})"
        flag = f"--{prefix}{item.name.replace('_', '-')}"
        dest = f"set:{prefix}{item.name}"
        if hints[item.name] is bool:
            group.add_argument(flag, dest=dest, default=None, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = (*typing.get_args(hints[item.name]), hints[item.name])[0]  # of "float | None" the first
            metavar = {int: "N", float: "X", Count: "TOKENS"}.get(kind, "NAME")
            group.add_argument(flag, dest=dest, default=None, metavar=metavar, help=text)


def settings_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """The config settings that were given on the command line, nested by their dots."""
    settings: dict[str, Any] = {}
    for dest, value in vars(parsed).items():
        if dest.startswith("set:") and value is not None:
            *path, name = dest.removeprefix("set:").split(".")
            place = settings
            for part in path:
                place = place.setdefault(part, {})
            place[name] = value
    return settings


def number(parsed: argparse.Namespace, name: str, default: Any) -> Any:
    """An option that is a positive whole number.

    Raises:
        ConfigError: it is not.
    """
    value = getattr(parsed, name)
    if value is None:
        return default
    count = convert(value, int, f"--{name.replace('_', '-')}")
    if count < 1:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {count}")
    return count
