"""The parts of the self-test, and the program that runs them and keeps their results.

The results of every function of a part are kept in ``results.json``. Later calls run only what is missing, and again
what failed before a change of the package. ``report.md`` has the tables of all parts, ``errors.txt`` the tracebacks of
checks that raised.
"""

import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from antransformer.benchmarks.timing import describe_error, installed_versions, machine_info
from antransformer.errors import ConfigError, MachineError
from antransformer.files import read_json, replace_text
from antransformer.results.folder import require_own_folder
from antransformer.selftest import PARTS, checkpoints, kernels, models, processes, speed, training
from antransformer.selftest.checks import Check, Checks, Setup, Unfinished, failed
from antransformer.training.device import release_memory
from antransformer.version import __version__

RESULTS, REPORT = "results.json", "report.md"
ERRORS = "errors.txt"
MINUTES = 9  # of the part ``training``, which stops then and continues later
SHORT_MINUTES = 5  # a call with less time left starts no function of another part

# Functions of each part.
CHECKS: dict[str, tuple[Checks, ...]] = {
    "kernels": (kernels.interpolate_norm, kernels.projection, kernels.cross_entropy, kernels.fp8),
    "models": (
        models.architectures,
        models.masked_queries,
        models.documents,
        models.bounds,
        models.drift,
        models.folded,
    ),
    "checkpoints": (checkpoints.resume, checkpoints.compiled, checkpoints.on_cpu),
    "processes": (processes.replicated, processes.sharded),
    "speed-125m": (speed.steps_125m,),
    "speed-0.5b": (speed.steps_half_billion,),
    "speed": (speed.peers, speed.fp8, speed.cuda_graphs, speed.optimizer),
    "generation": (speed.generation,),
    "training": (training.comparison,),
}


@dataclass(frozen=True)
class Result:
    """Outcome of one function of a part.

    Attributes:
        part: name of the part.
        function: name of the function.
        seconds: time that it took.
        source: digest of the package that it tested.
        checks: its figures.
    """

    part: str
    function: str
    seconds: float
    source: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if check.passed is False]


Results = dict[tuple[str, str], Result]  # by part and function


def run(
    setup: Setup, names: Sequence[str], minutes: float | None, report: Callable[[str, list[Result]], None]
) -> Results:
    """Run every function that has no result yet, or that failed before the package was changed.

    Args:
        setup: device, folder and log.
        names: parts to run; none selects all.
        minutes: total time of this call. With less than ``MINUTES`` left the part ``training`` does not start, and with
            less than ``SHORT_MINUTES`` no function of another part. None for no limit.
        report: receives every part that ran and the results of its functions.

    Returns:
        All results, of earlier calls too.

    Raises:
        ConfigError: the folder has results of another machine or torch.
        MachineError: the device fails after a function; its result is kept.
    """
    ends = math.inf if minutes is None else time.monotonic() + 60 * minutes
    results, source = load(setup), source_digest()
    save(setup, results)  # marks the folder as a self-test before the first part writes into it
    for part in names or PARTS:
        pending = [function for function in CHECKS[part] if is_pending(results.get((part, function.__name__)), source)]
        if not pending:
            continue
        try:
            in_time = run_part(setup, part, pending, results, source, ends)
        finally:
            report(part, results_of(results, part))
        if not in_time:
            break
    return results


def is_pending(result: Result | None, source: str) -> bool:
    """Whether a function has no result, or failed with other source code than this."""
    return result is None or (bool(result.failures) and result.source != source)


def results_of(results: Results, part: str) -> list[Result]:
    """Results of a part, in the order of its functions."""
    keys = [(part, function.__name__) for function in CHECKS[part]]
    return [results[key] for key in keys if key in results]


def source_digest() -> str:
    """Digest of the source code of the package, twelve hexadecimal digits."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run_part(setup: Setup, part: str, pending: Sequence[Checks], results: Results, source: str, ends: float) -> bool:
    """Run functions of a part, and keep each result; return whether there was time for all of them."""
    setup.log(f"{part}: {PARTS[part]}")
    needed = MINUTES if part == "training" else SHORT_MINUTES
    left = list(pending)
    while left:
        if ends - time.monotonic() < 60 * needed:
            setup.log(f"{part}: less than {needed} minutes are left; the same command continues with it")
            return False
        result = run_function(setup, part, left[0], source)
        if result:  # without one it continues here
            results[part, result.function] = result
            save(setup, results)
            del left[0]
        clear_device(setup, part)
    return True


def clear_device(setup: Setup, part: str) -> None:
    """Release the memory of a part.

    Raises:
        MachineError: the device fails. After an illegal access every later call of the process would fail too.
    """
    try:
        release_memory(setup.device)
        if setup.device.type != "cpu":
            torch.accelerator.synchronize(setup.device)
    except RuntimeError as error:
        raise MachineError(
            f"the device fails after {part} ({describe_error(error)}); the same command continues with the other parts"
        ) from error


def run_function(setup: Setup, part: str, function: Checks, source: str) -> Result | None:
    """Run one function. If it raises, that is a failed check; None if it needs more time."""
    started, checks = time.monotonic(), []
    try:
        for check in function(setup):
            setup.log(f"  {check.name}: {check.figure}{' FAIL' if check.passed is False else ''}")
            checks.append(check)
    except Unfinished as reason:
        setup.log(f"  {reason}")
        return None
    except Exception as error:
        with (setup.folder / ERRORS).open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        checks.append(failed(function.__name__, describe_error(error)))
        setup.log(f"  {function.__name__}: {checks[-1].figure} FAIL")
    return Result(part, function.__name__, time.monotonic() - started, source, tuple(checks))


def identity(setup: Setup) -> dict[str, Any]:
    """Machine and versions that all results of a folder share."""
    return {"machine": machine_info(setup.device), "versions": installed_versions()}


def check_folder(setup: Setup) -> None:
    """Check that the folder is new or empty, or holds an earlier self-test of this machine.

    Raises:
        ConfigError: it is a file, or holds something else, or as in ``load``.
    """
    require_own_folder(setup.folder, "selftest")
    for name in (RESULTS, REPORT, ERRORS):
        if (setup.folder / name).is_dir():
            raise ConfigError(f"{setup.folder / name} is a folder: choose another --out")
    if not (setup.folder / RESULTS).exists() and setup.folder.is_dir() and any(setup.folder.iterdir()):
        raise ConfigError(f"{setup.folder} is not empty, and holds no self-test: choose another --out")
    load(setup)


def load(setup: Setup) -> Results:
    """Results of earlier calls.

    Raises:
        ConfigError: they belong to another machine or another torch, or the file is damaged.
    """
    path = setup.folder / RESULTS
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        machine = content["machine"]
        found = [_result(entry) for entry in content["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged or of another release: remove it, or choose another --out") from error
    # Not the number of threads: two calls may be limited differently.
    here = identity(setup)["machine"]
    if any(machine.get(key) != here[key] for key in ("device", "name", "torch")):
        raise ConfigError(f"{setup.folder} has results of another machine or torch: choose another --out")
    return {(result.part, result.function): result for result in found}


def _result(entry: dict[str, Any]) -> Result:
    """Result of a function as ``content`` writes it; raises ValueError, KeyError or TypeError if it is damaged."""
    checks = tuple(Check(**check) for check in entry["checks"])
    result = Result(**{**entry, "checks": checks, "seconds": float(entry["seconds"])})
    if result.part not in PARTS or any(check.passed not in (True, False, None) for check in checks):
        raise ValueError(result.part)
    return result


def content(setup: Setup, results: Results) -> dict[str, Any]:
    """Results as JSON types, with machine and versions."""
    return {**identity(setup), "parts": [asdict(result) for result in results.values()]}


def save(setup: Setup, results: Results) -> None:
    """Write ``results.json`` and ``report.md``."""
    replace_text(setup.folder / RESULTS, json.dumps(content(setup, results), indent=2) + "\n")
    replace_text(setup.folder / REPORT, markdown(setup, results))


def markdown(setup: Setup, results: Results) -> str:
    """All tables, to be pasted into docs/gpu.md."""
    machine = machine_info(setup.device)
    libraries = installed_versions() | {name: machine[name] for name in ("cuda", "cudnn") if name in machine}
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    sources = " and ".join(sorted({result.source for result in results.values()}))
    lines = [f"## {machine['name']}", ""]
    lines += [f"antransformer {__version__} (source {sources}), {versions}; {machine['threads']} CPU threads.", ""]
    for part, title in PARTS.items():
        checks = [check for result in results_of(results, part) for check in result.checks]
        if checks:
            lines += [f"### {title}", "", "| check | figure | limit | result |", "|---|---|---|---|"]
            lines += [f"| {check.name} | {check.figure} | {check.limit} | {outcome(check)} |" for check in checks]
            lines += [""]
    return "\n".join(lines)


def outcome(check: Check) -> str:
    """``PASS``, ``FAIL``, or "" for a figure without a limit."""
    return {True: "PASS", False: "FAIL", None: ""}[check.passed]
