"""What several verbs do before and after their work."""

import os
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from antransformer.cli.progress import PrepareProgress
from antransformer.data import Dataset, ensure_default
from antransformer.errors import ConfigError

DEFAULT_DATA = "python-stdlib"
DATA_ROOT = Path("data")


def open_data(name: str) -> Dataset:
    """The prepared and verified data folder; the built-in corpus is prepared the first time that it is asked for."""
    if name != DEFAULT_DATA:
        return Dataset.open(name)
    if not (DATA_ROOT / name).exists():
        print(f"preparing {DATA_ROOT / name}: the source of this Python's standard library", flush=True)
    with PrepareProgress(name) as progress:
        folder = ensure_default(DATA_ROOT, progress)
    return Dataset.open(folder)


def check_target(option: str, path: Path, endings: tuple[str, ...] = ()) -> None:
    """Refuse, before the work, a file that can not be written after it.

    Raises:
        ConfigError: its folder does not exist, it is a folder itself, or its ending is not among those given.
    """
    if endings and path.suffix not in endings:
        raise ConfigError(f"{option} {path}: the name of a picture ends in {', '.join(endings)}")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: give the name of a file in a folder that exists")


def check_folder(path: Path) -> None:
    """Refuse, before the work, a folder that can not be made after it.

    Raises:
        ConfigError: it, or a folder that it would lie in, is a file.
    """
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"{there} is a file: choose the name of a folder for --out")


def new_table(*columns: str) -> Table:
    """A plain table; all columns but the first hold numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", vertical="bottom")
    return table
