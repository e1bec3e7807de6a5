"""Records of experiments as JSON: a format and a version, then the fields of a dataclass; null is infinity.

Every value is checked against its type hint, since a file may be damaged, edited or made by another program.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from antransformer.errors import DataError
from antransformer.files import read_json, replace_text

SMALLEST, LARGEST = 1e-30, 1e30  # products and powers of numbers outside overflow
MAY_BE_ZERO = {"seed", "seeds", "step", "trial_tokens", "value"}
FINITE = {"lr", "value"}

Record = TypeVar("Record")


def save_record(record: Any, path: Path, format_name: str, version: int) -> None:
    """Write a dataclass as JSON; infinite numbers and NaN become null."""
    content = nonfinite_as_null({"format": format_name, "version": version, **asdict(record)})
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_record(
    record_type: type[Record],
    path: Path,
    format_name: str,
    version: int,
    upgrades: Mapping[int, Callable[[dict[str, Any]], None]],
) -> Record:
    """Read a dataclass from JSON.

    Args:
        record_type: dataclass whose ``__post_init__`` raises ValueError for inconsistent values.
        path: the file.
        format_name, version: as in ``save_record``.
        upgrades: functions by older version; each changes the content to the next version.

    Raises:
        DataError: the file is missing, damaged, or of another format or version.
    """
    try:
        content = read_json(path)
        saved_version = content.pop("version")
        if content.pop("format") != format_name or saved_version not in {version, *upgrades}:
            raise ValueError(f"expected format {format_name}, version {version}")
        for older_version in range(saved_version, version):
            upgrades[older_version](content)
        return parse(record_type, content)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the folder of a finished experiment") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or was written by another release ({error})") from error


def parse(record_type: type[Record], content: Mapping[str, Any]) -> Record:
    """Return a dataclass from parsed JSON; keys that are not fields are ignored.

    Raises:
        KeyError: a field is missing.
        TypeError: a mapping or a list has another type.
        ValueError: a value has another type or is out of range.
    """
    hints = get_type_hints(record_type)
    names = [field.name for field in fields(record_type)]  # type: ignore[arg-type]
    return record_type(**{name: _parse_value(name, hints[name], content[name]) for name in names})


def _parse_value(name: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_parse_value(name, get_args(hint)[0], item) for item in value)
    if is_dataclass(hint):
        return parse(hint, value)  # type: ignore[arg-type]
    if hint is float and value is None:
        value = math.inf
    if not _is_valid(name, hint, value):
        raise ValueError(f"{name} cannot be {value!r}")
    return float(value) if hint is float else value


def _is_valid(name: str, hint: Any, value: Any) -> bool:
    if hint is str:
        return isinstance(value, str) and value != "" and ".." not in value  # some are names of folders
    if hint is int:
        return type(value) is int and (0 < value < 2**63 or (value == 0 and name in MAY_BE_ZERO))
    if hint is float:
        if type(value) not in (int, float):
            return False
        in_range = SMALLEST < value < LARGEST or (value == 0 and name in MAY_BE_ZERO)
        return in_range or (value == math.inf and name not in FINITE)
    return isinstance(value, get_origin(hint) or hint)


def nonfinite_as_null(value: Any) -> Any:
    """Copy of a JSON value in which NaN and infinities are None."""
    if isinstance(value, dict):
        return {key: nonfinite_as_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_as_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
