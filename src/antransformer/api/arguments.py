"""Checks of the arguments of the Python interface, by their annotations."""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from antransformer.errors import ConfigError
from antransformer.files import as_path
from antransformer.settings import convert, shown

P = ParamSpec("P")
T = TypeVar("T")
CONVERTED = (int, float, bool, str, int | None, float | None, bool | None, str | None)
PATHS = (str | Path, str | Path | None)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function whose arguments are converted and checked as settings are.

    A number may be text, and of another type, such as numpy's. A single value is a sequence of one.

    Raises:
        ConfigError: by the function returned, if a number, truth value, text or sequence has another type.
        TypeError: by the function returned, if a path has another type.
    """
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _argument(value, hints[name], name)
        return function(*bound.args, **bound.kwargs)

    return call


def _argument(value: Any, hint: Any, name: str) -> Any:
    alternatives = typing.get_args(hint)
    if value is None and type(None) in alternatives:
        return None
    if hint in CONVERTED:
        return convert(value, hint, name)
    if hint in PATHS:
        as_path(name, value, "a file or folder")  # not converted: the text may also be a name, as of a tokenizer
    if len(alternatives) == 2 and alternatives[1] is type(None):
        hint = alternatives[0]
    if typing.get_origin(hint) is Sequence:
        values = [value] if isinstance(value, str | Path | int | float) else value
        if not isinstance(values, Iterable):
            raise ConfigError(f"{name} must be a list, got {shown(value)}")
        return [_argument(item, typing.get_args(hint)[0], name) for item in values]
    return value
