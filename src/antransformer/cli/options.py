"""Parser and options of the command line; settings become options from the fields of the config dataclasses."""

import argparse
import dataclasses
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from antransformer import renamed
from antransformer.errors import ConfigError, UsageError
from antransformer.models.config import ModelConfig
from antransformer.runs import shared_settings
from antransformer.settings import Count, Words, convert, nearest
from antransformer.training.config import TrainConfig

REMOVED = {f"--{name.replace('_', '-')}" for name in renamed.REMOVED}
MAY_BE_EMPTY = ("--prompt",)
SETTING = "set:"  # start of the destination of options that are settings


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the paragraphs and examples of a description, and leaves room for option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Unlike argparse, without breaks at hyphens: names such as --lr-trials can then be copied.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            "\n".join(_fill_line(line, width) for line in part.splitlines())
            if "\n  " in part
            else "\n".join(self._split_lines(part, width))
            for part in paragraphs
        )


def _fill_line(line: str, width: int) -> str:
    """An example as lines of at most ``width`` columns, which a shell reads as one."""
    if len(line) <= width:
        return line
    whole = re.sub(r"(--\S+) (?!-)", r"\1\0", line)  # no break between an option and its value
    parts = textwrap.wrap(whole, width - 2, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * 6)
    return " \\\n".join(parts).replace("\0", " ")


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, which names the nearest option and the new name of an old one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError`` instead of printing the usage."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words of a command line, which are kept as ``words``.

        Raises:
            UsageError: an option is unknown or has an old name, or a value is missing or wrong.
        """
        verbs = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        at = next((index for index, word in enumerate(words) if word in verbs.choices), None)
        verb = self if at is None else verbs.choices[words[at]]
        # First: argparse may complain about a value that belongs to an old option, or about a missing option.
        verb.check_renamed(words)
        if at is not None:
            verb.check_known(words[at + 1 :])
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            verb.refuse(unknown[0])
        parsed.words = list(words)
        return parsed

    def check_renamed(self, words: Sequence[str]) -> None:
        """Raise ``UsageError`` for an old option or value, naming the new one, and for an empty value."""
        known = self._known_options()
        for word, following in zip_longest(words, words[1:]):
            if word == "--":  # only positional arguments follow
                return
            name, given, value = word.partition("=")
            # A path of no characters would be the current folder: a variable of the shell that is not set.
            if name in known and (value if given else following) == "" and name not in MAY_BE_EMPTY:
                raise UsageError(f"{name} has an empty value: give one, or omit the option (see {self.prog} --help)")
            if name in renamed.OPTIONS and name not in known and renamed.OPTIONS[name] in known:
                raise UsageError(f"{name} is now {renamed.OPTIONS[name]} (see {self.prog} --help)")
            if name in REMOVED and name not in known:
                raise UsageError(f"{name} was removed: omit it (see {self.prog} --help)")
            old_values = renamed.VALUES.get(name.removeprefix("--"), {})
            value = value if given else following or ""
            if name in known and value in old_values:
                raise UsageError(f"{name} {value} is now {name} {old_values[value]} (see {self.prog} --help)")

    def check_known(self, words: Sequence[str]) -> None:
        """Raise ``UsageError`` for an unknown option, which may be a misspelt one that argparse would call missing."""
        known = self._known_options()
        for word in words:
            if word == "--":  # only positional arguments follow
                return
            if word.startswith("--") and word.partition("=")[0] not in known:
                self.refuse(word)

    def refuse(self, word: str) -> NoReturn:
        """Raise ``UsageError`` for an argument that no option took."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            raise UsageError(f"unexpected argument {word} (see {self.prog} --help)")
        raise UsageError(f"unknown option {name}{nearest(name, self._known_options())} (see {self.prog} --help)")

    def _known_options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def add_config(
    group: Any,
    config: type,
    prefix: str = "",
    only: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    same_as: Sequence[str] = (),
) -> None:
    """Add an option for each field of a dataclass that has a help text; values stay text until they are checked.

    ``defaults`` replaces defaults of the dataclass in the help text. Fields in ``same_as`` also have an option without
    the prefix, to which their help refers.
    """
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        if "help" not in item.metadata or item.metadata["recorded"] or (only and item.name not in only):
            continue
        text = item.metadata["help"].replace("%", "%%")
        default = defaults.get(item.name, item.default)
        if default is not None and default is not False and "(default" not in text:
            text += f" (default {default})"
        if item.name in same_as:
            text = f"same as --{item.name.replace('_', '-')}"
        flag = f"--{prefix}{item.name.replace('_', '-')}"
        dest = f"{SETTING}{prefix}{item.name}"
        if hints[item.name] in (bool, bool | None):
            group.add_argument(flag, dest=dest, default=None, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = (*typing.get_args(hints[item.name]), hints[item.name])[0]  # the first of "float | None"
            metavar = {int: "N", float: "X", Count: "TOKENS"}.get(kind, "NAME")
            nargs = "+" if kind is Words else None
            group.add_argument(flag, dest=dest, default=None, metavar=metavar, nargs=nargs, help=text)


def settings_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line, nested at their dots."""
    settings: dict[str, Any] = {}
    for dest, value in vars(parsed).items():
        if dest.startswith(SETTING) and value is not None:
            *path, name = dest.removeprefix(SETTING).split(".")
            level = settings
            for part in path:
                level = level.setdefault(part, {})
            level[name] = value
    return settings


def number(parsed: argparse.Namespace, name: str, default: Any) -> Any:
    """Return an option as a positive integer, or the default if it is not given.

    Raises:
        ConfigError: the value is not a positive integer.
    """
    value = getattr(parsed, name)
    if value is None:
        return default
    option = f"--{name.replace('_', '-')}"
    count = convert(value, int, option)
    if count < 1:
        raise ConfigError(f"{option} must be at least 1, got {count}")
    return count


def add_checkpoint_argument(parser: Parser) -> None:
    """Add ``--checkpoint``, which most verbs that use a trained model require."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder or checkpoint")


def add_device_argument(parser: Parser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")


def add_queue_arguments(parser: Parser, out: str) -> None:
    """Add the options of every experiment: devices, number of workers, and folder (default ``out``)."""
    parser.add_argument(
        "--devices", nargs="+", metavar="NAME", default=(), help="one worker per device, such as cuda:0"
    )
    parser.add_argument(
        "--workers", metavar="N", help="parallel runs (default: one per GPU, or one per CPU core, at most 8)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the runs and the report (default {out})")


def add_experiment_arguments(parser: Parser, lr_trials: int, out: str) -> None:
    """Add the options that comparisons and ablations share."""
    parser.add_argument("--seeds", metavar="N", help="measured seeds per budget; trials use another seed (default 3)")
    parser.add_argument(
        "--lr-trials",
        metavar="N",
        help="number of learning rates to try, spaced by factors of 2 around the default; 1 keeps the default. The "
        "grid is extended while the best value is at an edge. Then a third and three times the best are tried. With "
        f"Muon, its own learning rate is searched too (default {lr_trials})",
    )
    parser.add_argument(
        "--trial-tokens",
        metavar="TOKENS",
        help="search at this budget only and use the result at every budget (default: search at every budget)",
    )
    add_queue_arguments(parser, out)
    add_config(parser, TrainConfig, only=shared_settings.TRAINING)
    group = parser.add_argument_group("model settings", "override the preset, for all variants")
    add_config(group, ModelConfig, prefix="model.", only=shared_settings.MODEL)


def experiment_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``add_experiment_arguments`` and the settings as arguments of the Python interface."""
    options = {name: number(parsed, name, None) for name in ("seeds", "lr_trials", "workers")}
    if parsed.trial_tokens:
        options["trial_tokens"] = convert(parsed.trial_tokens, Count, "--trial-tokens")
    given = {name: value for name, value in options.items() if value is not None}
    return {**given, "devices": parsed.devices, "progress": True, **settings_of(parsed)}
