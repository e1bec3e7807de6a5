"""A new folder that is complete or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from antransformer.errors import ConfigError, MachineError
from antransformer.files import check_folder_target
from antransformer.lock import new_path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Create a hidden folder, which is renamed to ``folder`` when the context ends, and removed after an error.

    Raises:
        ConfigError: the folder is not empty or cannot be created, or another process writes it.
        MachineError: files cannot be written.
    """
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"{folder} is a link to nothing: choose another --out")
    folder = Path(os.path.realpath(folder))  # Path.resolve raises on a loop of links
    check_folder_target(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not an empty folder: choose another --out")
    if os.path.ismount(folder):
        raise ConfigError(f"{folder} is a mount point, which cannot be replaced: choose a folder inside it as --out")
    try:
        with new_path(folder) as partial:
            partial.mkdir()
            yield partial
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
