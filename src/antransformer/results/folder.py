"""Which command wrote a folder, so that no command writes into the output of another."""

import re
from pathlib import Path

from antransformer.errors import ConfigError
from antransformer.files import check_folder_target, read_json
from antransformer.reporting.html import FILE as REPORT_FILE
from antransformer.results import comparison, sweep
from antransformer.training import run_folder

DESCRIPTIONS = {
    "train": "a training run",
    "prepare": "prepared data",
    "export": "an exported model",
    "compare": "a comparison",
    "ablate": "an ablation",
    "sweep": "a sweep",
    "selftest": "a selftest",
}
EXPERIMENTS = ("compare", "ablate", "sweep")
RUNS = "runs"  # folder of the runs of an experiment


def require_own_folder(folder: Path, verb: str, option: str = "--out") -> None:
    """Check that the folder of an option is free for the output of a verb, or holds its earlier output.

    Raises:
        ConfigError: the path or a parent of it is a file, or the folder holds the output of another verb, or a report
            of unknown origin that an experiment would replace.
    """
    check_folder_target(folder, option)
    writer = writer_of(folder)
    if writer not in (None, verb):
        raise ConfigError(f"{folder} holds {DESCRIPTIONS[writer]}: choose another {option}")
    if writer is None and verb in EXPERIMENTS and (folder / REPORT_FILE).exists():
        raise ConfigError(f"{folder} holds a {REPORT_FILE} that {verb} did not write: choose another {option}")


def writer_of(folder: Path) -> str | None:
    """Verb that wrote a folder, or None for a folder that is new or of unknown origin."""
    files = {
        run_folder.CONFIG_FILE: "train",
        run_folder.CHECKPOINTS: "train",
        "meta.json": "prepare",
        "model.safetensors": "export",
        "model.safetensors.index.json": "export",
        sweep.FILE: "sweep",
    }
    found = next((verb for name, verb in files.items() if (folder / name).exists()), None)
    return found or _writer_of_results(folder / comparison.FILE) or _writer_of_runs(folder / RUNS)


def _writer_of_results(path: Path) -> str | None:
    """``compare``, ``ablate`` or ``selftest`` by the content of ``results.json``."""
    try:
        content = dict(read_json(path))
    except (OSError, ValueError, TypeError):  # missing, or damaged, which its reader reports
        return "compare" if path.exists() else None
    kind = "selftest" if "parts" in content else content.get("kind", "compare")
    return kind if kind in DESCRIPTIONS else None


def _writer_of_runs(folder: Path) -> str | None:
    """Verb of an unfinished experiment, by the names of its runs."""
    names = [path.name for path in folder.glob("*-seed*")]
    if not names:
        return None
    if any(re.search(r"-b\d+-lr", name) for name in names):
        return "sweep"
    return "ablate" if any(name.startswith("default-") for name in names) else "compare"
