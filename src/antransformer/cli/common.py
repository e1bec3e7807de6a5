"""What several verbs do before their work."""

from pathlib import Path

from antransformer.cli.progress import PrepareProgress
from antransformer.data import Dataset, ensure_default

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
