"""The parts of the self-test, and the program that runs them and keeps their results.

The results of finished parts are kept in ``results.json``, and later calls run only what is missing. ``report.md`` has
the tables of all finished parts, ``errors.txt`` the tracebacks of checks that raised.
"""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from antransformer.benchmarks.timing import describe_error, installed_versions, machine_info
from antransformer.errors import ConfigError, MachineError
from antransformer.files import read_json, replace_text
from antransformer.results.folder import require_own_folder
from antransformer.selftest import PARTS, checkpoints, kernels, models, processes, speed, training
from antransformer.selftest.checks import Check, Checks, Setup, Unfinished
from antransformer.training.device import release_memory

RESULTS, REPORT = "results.json", "report.md"
ERRORS = "errors.txt"
MINUTES = 9  # of the part ``training``; a call with less time left starts no part


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
    """Outcome of one part.

    Attributes:
        part: its name.
        seconds: time that it took.
        checks: its figures.
        finished: whether it is complete; otherwise the next call continues it.
    """

    part: str
    seconds: float
    checks: tuple[Check, ...]
    finished: bool = True

    @property
    def failures(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if check.passed is False]


def run(
    setup: Setup, names: Sequence[str], minutes: float | None, report: Callable[[Result], None]
) -> dict[str, Result]:
    """Run the parts that have no result yet.

    Args:
        setup: device, folder and log.
        names: parts to run; none selects all.
        minutes: total time of this call: no part starts with less than ``MINUTES`` left. None for no limit.
        report: receives the result of each part that ran.

    Returns:
        Results of all parts that are finished, of earlier calls too.

    Raises:
        ConfigError: the folder has results of another machine or torch.
        MachineError: the device fails after a part; its result is kept.
    """
    started = time.monotonic()
    results = load(setup)
    save(setup, results)  # marks the folder as a self-test before the first part writes into it
    pending = [name for name in names or PARTS if name not in results]
    while pending:
        left = None if minutes is None else minutes - (time.monotonic() - started) / 60
        part = pending[0]
        if left is not None and left < MINUTES:
            setup.log(f"{part}: less than {MINUTES} minutes are left; the same command continues with it")
            break
        result = run_part(setup, part)
        report(result)
        if result.finished:
            results[part] = result
            pending.remove(part)
            save(setup, results)
        clear_device(setup, part)
    return results


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


def run_part(setup: Setup, name: str) -> Result:
    """Run one part. A function that raises is a failed check, so that the others are still run."""
    started, checks, finished = time.monotonic(), [], True
    setup.log(f"{name}: {PARTS[name]}")
    for function in CHECKS[name]:
        try:
            for check in function(setup):
                setup.log(f"  {check.name}: {check.figure}{' FAIL' if check.passed is False else ''}")
                checks.append(check)
        except Unfinished as reason:
            setup.log(f"  {reason}")
            finished = False
        except Exception as error:
            with (setup.folder / ERRORS).open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            checks.append(Check(function.__name__, describe_error(error), "no error", False))
            setup.log(f"  {function.__name__}: {checks[-1].figure} FAIL")
    return Result(name, time.monotonic() - started, tuple(checks), finished)


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


def load(setup: Setup) -> dict[str, Result]:
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
        parts = [_result(part) for part in content["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: remove it, or choose another --out") from error
    # Not the number of threads: two calls may be limited differently.
    here = identity(setup)["machine"]
    if any(machine.get(key) != here[key] for key in ("device", "name", "torch")):
        raise ConfigError(f"{setup.folder} has results of another machine or torch: choose another --out")
    return {part.part: part for part in parts}


def _result(part: dict[str, Any]) -> Result:
    """Result of a part as ``content`` writes it; raises ValueError, KeyError or TypeError if it is damaged."""
    checks = tuple(Check(**check) for check in part["checks"])
    result = Result(**{**part, "checks": checks, "seconds": float(part["seconds"])})
    if result.part not in PARTS or any(check.passed not in (True, False, None) for check in checks):
        raise ValueError(result.part)
    return result


def content(setup: Setup, results: dict[str, Result]) -> dict[str, Any]:
    """Results as JSON types, with machine and versions."""
    return {**identity(setup), "parts": [asdict(result) for result in results.values()]}


def save(setup: Setup, results: dict[str, Result]) -> None:
    """Write ``results.json`` and ``report.md``."""
    replace_text(setup.folder / RESULTS, json.dumps(content(setup, results), indent=2) + "\n")
    replace_text(setup.folder / REPORT, markdown(setup, results))


def markdown(setup: Setup, results: dict[str, Result]) -> str:
    """All tables, to be pasted into docs/gpu.md."""
    machine = machine_info(setup.device)
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    lines = [f"## {machine['name']}", "", f"{versions}; {machine['threads']} CPU threads.", ""]
    for name, result in results.items():
        lines += [f"### {PARTS[name]}", "", "| check | figure | limit | result |", "|---|---|---|---|"]
        lines += [f"| {check.name} | {check.figure} | {check.limit} | {outcome(check)} |" for check in result.checks]
        lines += [""]
    return "\n".join(lines)


def outcome(check: Check) -> str:
    """``PASS``, ``FAIL``, or "" for a figure without a limit."""
    return {True: "PASS", False: "FAIL", None: ""}[check.passed]
