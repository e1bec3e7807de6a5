"""The parts of the self-test, and the program that runs them and keeps their results.

The results of every unit of a part are kept in ``results.json``. Later calls run what is missing, then again what was
interrupted and what failed before a change of the package. ``report.md`` has the tables of all parts, ``errors.txt``
the tracebacks of checks that raised.
"""

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from antransformer.benchmarks.timing import describe_error, installed_versions, machine_info
from antransformer.errors import ConfigError, MachineError, RunStoppedError
from antransformer.files import read_json, replace_text
from antransformer.models.registry import BUILT_IN
from antransformer.results.folder import require_own_folder
from antransformer.selftest import PARTS, checkpoints, kernels, models, processes, speed, training
from antransformer.selftest.checks import Check, Checks, Setup, Unfinished, failed
from antransformer.training.device import release_memory
from antransformer.version import __version__

RESULTS, REPORT = "results.json", "report.md"
ERRORS = "errors.txt"


class Unit(NamedTuple):
    """A function of a part with its arguments. Its results are kept together, and its time is the unit of a call.

    Attributes:
        function: yields the checks.
        arguments: its arguments after the setup.
        minutes: estimate of its time on a GPU, most of which is compilation. For ``training.comparison``, which stops
            in time and continues later, the time in which it prepares its data.
    """

    function: Checks
    arguments: tuple[Any, ...] = ()
    minutes: float = 1.0

    @property
    def name(self) -> str:
        """Name that is unique in the part."""
        return " ".join(map(str, (self.function.__name__, *self.arguments)))


def _step_units(preset: str, compiled_minutes: float) -> tuple[Unit, ...]:
    modes = {"eager": 2.0, "compiled": compiled_minutes}
    return tuple(Unit(speed.steps, (preset, mode), minutes) for mode, minutes in modes.items())


CHECKS: dict[str, tuple[Unit, ...]] = {
    "kernels": tuple(map(Unit, (kernels.interpolate_norm, kernels.projection, kernels.cross_entropy, kernels.fp8))),
    "models": (
        *(Unit(models.outputs, (name,), 2.0) for name in BUILT_IN),
        Unit(models.masked_queries),
        Unit(models.documents, minutes=2.0),
        *(Unit(models.bounds, (name,)) for name in models.BOUNDED),
        *(Unit(models.drift, (name,), 2.0) for name in models.BOUNDED),
        Unit(models.folded),
    ),
    "checkpoints": (
        *(Unit(checkpoints.resume, (name,)) for name in checkpoints.RUNS),
        Unit(checkpoints.compiled, minutes=4.0),
        Unit(checkpoints.on_cpu),
    ),
    "processes": tuple(
        Unit(function, (name,), 3.0)
        for function in (processes.replicated, processes.sharded)
        for name in processes.RUNS
    ),
    "speed-125m": _step_units("125m", 5.0),
    "speed-0.5b": _step_units("0.5b", 6.0),
    "speed": (
        *(Unit(speed.peer, (name,), 4.0) for name in speed.PEERS),
        Unit(speed.fp8, minutes=6.0),
        Unit(speed.cuda_graphs, minutes=2.0),
        Unit(speed.optimizer, minutes=2.0),
    ),
    "generation": tuple(
        Unit(speed.generation, (mode, batch, group), minutes)
        for mode, minutes in (("eager", 2.0), ("compiled", 5.0))
        for batch in (1, 16)
        for group in speed.GENERATORS
    ),
    "training": (Unit(training.comparison, minutes=5.0),),
}
MINUTES = max(unit.minutes for units in CHECKS.values() for unit in units)  # shortest call that can run every unit


@dataclass(frozen=True)
class Result:
    """Outcome of a unit.

    Attributes:
        part: name of the part.
        unit: name of the unit.
        seconds: time that it took.
        source: digest of the package that it tested; empty for a unit that was interrupted.
        checks: its figures.
    """

    part: str
    unit: str
    seconds: float
    source: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if check.passed is False]


Results = dict[tuple[str, str], Result]  # by part and unit


def run(setup: Setup, names: Sequence[str], report: Callable[[str, list[Result]], None]) -> Results:
    """Run what is pending, and stop before the first unit that should take longer than the time left.

    A call runs at least one unit. Units that have a result are last, so that one that ended a call by force does not
    keep the others from running.

    Args:
        setup: device, folder, time and log.
        names: parts to run; none selects all.
        report: receives every part that ran and the results of its units.

    Returns:
        All results, of earlier calls too.

    Raises:
        ConfigError: the folder has results of another machine or torch.
        MachineError: the device fails after a unit, whose result is kept.
        RunStoppedError: a signal arrived during a training run.
    """
    results, source = load(setup), source_digest()
    save(setup, results)  # marks the folder as a self-test before the first part writes into it
    units = [(part, unit) for part in names or PARTS for unit in pending(results, part, source)]
    units.sort(key=lambda pair: (pair[0], pair[1].name) in results)
    for part, group in groupby(units, key=itemgetter(0)):
        started = False
        try:
            for _, unit in group:
                ends = time.monotonic() + expected_seconds(results, part, unit)
                if ends > setup.deadline and (part, unit) != units[0]:
                    return results
                if not started:
                    setup.log(f"{part}: {PARTS[part]}")
                started = True
                if not run_unit(setup, part, unit, results, source):
                    return results
        finally:
            if started:
                report(part, results_of(results, part))
    return results


def pending(results: Results, part: str, source: str) -> list[Unit]:
    """Units of a part that have no result, were interrupted, or failed with other source code than this."""

    def is_pending(result: Result | None) -> bool:
        return result is None or (bool(result.failures) and result.source != source)

    return [unit for unit in CHECKS[part] if is_pending(results.get((part, unit.name)))]


def expected_seconds(results: Results, part: str, unit: Unit) -> float:
    """Longest time of units with the same function and estimate; before one of them has passed, the estimate."""
    alike = {other.name for other in CHECKS[part] if other._replace(arguments=unit.arguments) == unit}
    times = [result.seconds for result in results_of(results, part) if result.unit in alike and not result.failures]
    return max(times, default=60 * unit.minutes)


def results_of(results: Results, part: str) -> list[Result]:
    """Results of a part, in the order of its units."""
    keys = [(part, unit.name) for unit in CHECKS[part]]
    return [results[key] for key in keys if key in results]


def source_digest() -> str:
    """Digest of the source code of the package, twelve hexadecimal digits."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run_unit(setup: Setup, part: str, unit: Unit, results: Results, source: str) -> bool:
    """Run a unit and keep its result; False if it has used up the time of the call and continues in the next one.

    Raises:
        MachineError: as in ``clear_device``.
        RunStoppedError: as in ``run``.
    """
    interrupted = Result(part, unit.name, 0.0, "", (failed(unit.name, "interrupted"),))
    save(setup, results | {(part, unit.name): interrupted})  # stays if the process is killed
    result = outcome_of(setup, part, unit, source)
    if result:
        results[part, unit.name] = result
    save(setup, results)
    clear_device(setup, part)
    return result is not None


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


def outcome_of(setup: Setup, part: str, unit: Unit, source: str) -> Result | None:
    """Result of a unit. If it raises, that is a failed check; None if it needs more time."""
    started, checks = time.monotonic(), list[Check]()
    try:
        for check in unit.function(setup, *unit.arguments):
            setup.log(f"  {check.name}: {check.figure}{' FAIL' if check.passed is False else ''}")
            checks.append(check)
    except Unfinished as reason:
        setup.log(f"  {reason}")
        return None
    except RunStoppedError:  # by the user
        raise
    except Exception as error:
        with (setup.folder / ERRORS).open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        checks.append(failed(unit.name, describe_error(error)))
        setup.log(f"  {unit.name}: {checks[-1].figure} FAIL")
    return Result(part, unit.name, time.monotonic() - started, source, tuple(checks))


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
    return {(result.part, result.unit): result for result in found}


def _result(entry: dict[str, Any]) -> Result:
    """Result of a unit as ``content`` writes it; raises ValueError, KeyError or TypeError if it is damaged."""
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
    sources = " and ".join(sorted({result.source for result in results.values()} - {""}))
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
