"""A corpus that every machine has: the source of the running Python's own standard library."""

import shutil
import sysconfig
import tempfile
from pathlib import Path

from antransformer.data.dataset import Dataset
from antransformer.data.prepare import Progress, prepare
from antransformer.data.readers import check
from antransformer.data.sources import walk
from antransformer.errors import DataError

NAME = "python-stdlib"
VOCABULARY = 4096
VAL_FRACTION = 0.02
NOT_ITS_OWN = ("site-packages", "dist-packages", "__pycache__")


def stdlib_files() -> list[Path]:
    """The readable .py files of the standard library, sorted; what is installed beside it is left out.

    Raises:
        DataError: there are none, as in a Python that keeps its library in an archive.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in walk(folder, without=NOT_ITS_OWN) if path.suffix == ".py" and check(path)]
    if not files:
        raise DataError(f"{folder}: this Python has no standard library in source; prepare text of your own")
    return files


def ensure_default(root: str | Path, progress: Progress | None = None) -> Path:
    """The prepared folder ``root/python-stdlib``, made the first time (byte-pair encoding of 4,096 ids).

    Several processes may call it at once: each works in a folder of its own, the first to finish wins, and the others
    use its result. A process that is killed meanwhile leaves a hidden folder behind that can be removed.

    Raises:
        DataError: there is no source to read, or what is at ``root/python-stdlib`` is no whole data folder.
    """
    folder = Path(root) / NAME
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=root))
        try:
            made = prepare(
                stdlib_files(), scratch / NAME, bpe_vocab_size=VOCABULARY, val_fraction=VAL_FRACTION, progress=progress
            )
            made.path.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    Dataset.open(folder, verify=False)
    return folder
