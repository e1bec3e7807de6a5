"""Declaration, conversion and checks of settings.

A config is a frozen dataclass whose fields are declared with ``setting``: help text, default and range in one place.
Command line, YAML files and Python share the conversion and the checks.
"""

import difflib
import operator
import re
import reprlib
import shlex
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, NewType

from antransformer.errors import ConfigError

COUNT_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COMPARISONS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
BOUND_TEXTS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


# Names of settings in other training programs.
NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "min_lr": "min_lr_ratio",
    "batch_size": "batch_tokens",
    "global_batch_size": "batch_tokens",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "max_steps": "tokens",
    "max_iters": "tokens",
    "num_steps": "tokens",
    "num_iterations": "tokens",
    "train_iters": "tokens",
    "epochs": "tokens",
    "num_train_epochs": "tokens",
    "max_tokens": "tokens",
    "warmup_steps": "warmup_fraction",
    "warmup_iters": "warmup_fraction",
    "warmup_ratio": "warmup_fraction",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "grad_clip",
    "wd": "weight_decay",
    "optim": "optimizer",
    "dtype": "precision",
    "bf16": "precision",
    "fp16": "precision",
    "seq_len": "context",
    "seq_length": "context",
    "max_seq_len": "context",
    "sequence_length": "context",
    "block_size": "context",
    "n_ctx": "context",
    "dataset": "data",
    "data_dir": "data",
    "out_dir": "out",
    "output_dir": "out",
    "save_steps": "checkpoint_every",
    "eval_steps": "eval_every",
    "eval_interval": "eval_every",
    "logging_steps": "log_every",
    "log_interval": "log_every",
    "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "num_layers": "model.layers",
    "num_hidden_layers": "model.layers",
    "depth": "model.layers",
    "n_embd": "model.width",
    "dim": "model.width",
    "d_model": "model.width",
    "hidden_size": "model.width",
    "n_head": "model.head_dim",
    "n_heads": "model.head_dim",
    "num_heads": "model.head_dim",
    "num_attention_heads": "model.head_dim",
    "intermediate_size": "model.mlp_ratio",
}


class Count(int):
    """Integer that users may write as 60K or 2.5B."""


# Text that users may write as several words: shell words, quoted where necessary.
Words = NewType("Words", str)


def setting(
    help: str,
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] = (),
    recorded: bool = False,
) -> Any:
    """Declare a field of a config.

    Args:
        help: text for ``--help``. The default is added unless the text contains ``(default``.
        default: value of the field; None for an optional setting.
        ge: smallest permitted value.
        gt: bound that the value must exceed.
        le: largest permitted value.
        lt: bound that the value must stay below.
        choices: permitted values of a text setting.
        recorded: whether training itself sets the field, so that it is not an option of the command line.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "choices": tuple(choices),
        "recorded": recorded,
    }
    return field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Check every field of a config against its declared range and choices.

    Raises:
        ConfigError: naming the setting, the range and the value.
    """
    for item in fields(config):
        check_value(item, getattr(config, item.name), item.name)


def check_value(item: Field[Any], value: Any, key: str) -> None:
    """Check one value against the range and choices of its field. None is valid where it is the default.

    Raises:
        ConfigError: naming ``key``, the range and the value.
    """
    if value is None and item.default is None:
        return
    choices, bounds = item.metadata.get("choices"), item.metadata.get("bounds")
    if choices and value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {shown(value)}")
    if not bounds:
        return
    integer = issubclass(_value_type(item.type), int)
    right_type = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    # NaN fails every comparison, so it is outside of every range.
    if not right_type or not all(COMPARISONS[name](value, bound) for name, bound in bounds.items()):
        permitted = " and ".join(f"{BOUND_TEXTS[name]} {_bound_text(bound)}" for name, bound in bounds.items())
        kind = "" if right_type else "an integer " if integer else "a number "
        raise ConfigError(f"{key} must be {kind}{permitted}, got {shown(value)}")


def _bound_text(bound: float) -> str:
    if isinstance(bound, int):
        power_of_two = bound >= 2**31 and bound.bit_count() == 1
        return f"2^{bound.bit_length() - 1}" if power_of_two else f"{bound:,}"
    return f"{bound:g}"


def convert_settings(config: type, values: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Convert and check a user's values of fields of ``config``.

    Args:
        config: dataclass with a field for each key of ``values``.
        values: text, numbers or truth values.
        where: source of the values for messages, such as a file's name.
        prefix: prefix of the keys in messages, such as ``model.``.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    known = {item.name: item for item in fields(config)}
    converted = {}
    for name, value in values.items():
        key = f"{where}: {prefix}{name}"
        converted[name] = convert(value, known[name].type, key)
        check_value(known[name], converted[name], key)  # here, since only here the source of the value is known
    return converted


def convert(value: Any, hint: Any, key: str) -> Any:
    """Convert a user's value to the type ``hint``; numbers may be text such as 60K (counts) or 2e-3.

    Raises:
        ConfigError: the value does not fit the type; the message names ``key``.
    """
    if value is None and type(None) in typing.get_args(hint):
        return None
    reader, expected = _READERS[_value_type(hint)]
    try:
        return reader(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{key} must be {expected}, got {shown(value)}") from None


def _value_type(hint: Any) -> Any:
    """Type of a setting that is not None: float for ``float | None``."""
    return next((option for option in typing.get_args(hint) if option is not type(None)), hint)


def read_count(value: Any) -> Count:
    """Read 60K, 2.5B, 1e6 or 4096 as an integer.

    Raises:
        ValueError: the value is not an integer, or has more than 63 bits.
    """
    if isinstance(value, bool):
        raise ValueError(value)
    text = str(value).strip().replace("_", "")
    if "," in text and not re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?[A-Za-z]?", text):
        raise ValueError(value)  # a decimal comma: 2,5B must not become 25B
    text = text.replace(",", "")
    suffix = text[-1:].upper()
    scale = COUNT_SUFFIXES.get(suffix, 1)
    try:  # decimal: 4.1M is 4,099,999.9999999995 in binary floating point
        number = Decimal(text[:-1] if suffix in COUNT_SUFFIXES else text) * scale
        if number != int(number) or abs(number) >= 2**63:
            raise ValueError(value)
    except ArithmeticError:
        raise ValueError(value) from None
    return Count(int(number))


def shown(value: Any) -> str:
    """Short form of a value for a message."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"  # Python refuses to print more than 4,300 digits
    return reprlib.repr(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``: did you mean X?`` for a misspelt word, or an empty text if no known word is near.

    A setting of the model without its prefix, and the names that other programs give to a setting, are known too.
    """
    names = {_plain(name): name for name in sorted(known)}
    meaning = (f"model.{_plain(word)}", NAMES_ELSEWHERE.get(_plain(word), ""))
    match = [name for name in meaning if name in names] or difflib.get_close_matches(_plain(word), names, n=1)
    return f": did you mean {names[match[0]]}?" if match else ""


def _plain(name: str) -> str:
    """Name of a setting for its option: ``model.head_dim`` for ``--model.head-dim``."""
    return name.removeprefix("--").replace("-", "_")


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    number = int(value)
    if abs(number) >= 2**63:  # torch takes 64 bits
        raise ValueError(value)
    return number


def _read_float(value: Any) -> float:
    number = float(value) if not isinstance(value, bool) else float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(value)
    return number


def _read_bool(value: Any) -> bool:
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def _read_words(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return _read_str(value)
    if not value or not all(isinstance(word, (str, Path, int, float)) and str(word) for word in value):
        raise TypeError(value)
    # A single word may hold spaces, or be a list of words itself.
    return str(value[0]) if len(value) == 1 else shlex.join(str(word) for word in value)


def _read_str(value: Any) -> str:
    if not isinstance(value, (str, Path)):
        raise TypeError(value)
    return str(value)


_READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    Count: (read_count, "a count of tokens such as 4096, 60K or 2.5B"),
    int: (_read_int, "an integer of at most 63 bits"),
    float: (_read_float, "a number"),
    bool: (_read_bool, "true or false"),
    str: (_read_str, "text"),
    Words: (_read_words, "text or a list of words"),
}
