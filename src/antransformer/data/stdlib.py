"""Default corpus, available on every machine: the source code of Python's standard library."""

import shutil
import sysconfig
import tempfile
from pathlib import Path

from antransformer.data.dataset import Dataset
from antransformer.data.preparation import Progress, prepare
from antransformer.data.readers import is_readable
from antransformer.data.sources import walk
from antransformer.errors import DataError

NAME = "python-stdlib"
DATA_ROOT = Path("data")
VOCABULARY = 4096
VAL_FRACTION = 0.02
EXCLUDED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")


def stdlib_files() -> list[Path]:
    """Return the readable .py files of the standard library, sorted, without installed packages.

    Raises:
        DataError: no files were found, for example because the library is in an archive.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in walk(folder, excluded=EXCLUDED_FOLDERS) if path.suffix == ".py" and is_readable(path)]
    if not files:
        raise DataError(f"{folder}: this Python has no source code of its standard library; prepare your own text")
    return files


def ensure_default(root: str | Path, progress: Progress | None = None) -> Path:
    """Return the prepared folder ``root/python-stdlib`` and create it if necessary (byte-pair encoding, 4,096 ids).

    Several processes may call it at once. Each prepares its own folder, and all use the first one that is finished.
    A killed process leaves a hidden folder, which can be removed.

    Raises:
        DataError: there is no source code, or ``root/python-stdlib`` is not a complete data folder.
    """
    folder = Path(root) / NAME
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since rename works only within a file system.
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=root))
        try:
            dataset = prepare(
                stdlib_files(), scratch / NAME, bpe_vocab_size=VOCABULARY, val_fraction=VAL_FRACTION, progress=progress
            )
            dataset.path.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    Dataset.open(folder, verify=False)
    return folder


def is_prepared(name: str) -> bool:
    """Return whether ``open_data`` can open a dataset without preparing it first."""
    return name != NAME or (DATA_ROOT / name).exists()


def open_data(name: str, progress: Progress | None = None, verify: bool = True) -> Dataset:
    """Open a data folder and check a sample of it; ``python-stdlib`` is prepared in ``data/`` on first use.

    Raises:
        DataError: the folder is missing, damaged or of another format.
    """
    return Dataset.open(ensure_default(DATA_ROOT, progress) if name == NAME else name, verify)
