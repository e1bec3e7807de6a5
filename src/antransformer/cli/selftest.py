"""Check this machine: kernels, models, checkpoints, speed and a training comparison.

On a GPU, results are compared with the CPU, and speed with the goals of the project.

Every part prints a table. Results are kept in --out. The same command continues with the rest, and repeats what failed
if the package was changed since. At the end it prints report.md in that folder, which has all tables. On a GPU all
parts should take one to two hours; a CPU runs all of them in miniature.

Exit status 1 means that a check failed.

examples:
  antransformer selftest --device cuda
  antransformer selftest --device cuda --parts speed-125m --json speed.json
  antransformer selftest --device cuda --minutes 9
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from antransformer.cli.options import Parser, add_device_argument
from antransformer.cli.tables import TableConsole, new_table
from antransformer.errors import ConfigError, MachineError
from antransformer.files import check_json_target, write_result
from antransformer.selftest import PARTS
from antransformer.wording import counted

USAGE = "antransformer selftest [options]"
TABLE_WIDTH = 200  # columns, if the output is not a terminal


def add_arguments(parser: Parser) -> None:
    """Add the options of ``antransformer selftest``."""
    add_device_argument(parser)
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="NAME",
        choices=tuple(PARTS),
        default=(),
        help=f"from {', '.join(PARTS)} (default all)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="end within N minutes: start nothing that should take longer than the time left (default: no limit)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of results and runs (default runs/selftest-DEVICE)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")


def run(parsed: argparse.Namespace) -> None:
    """Run the parts and print their tables.

    Raises:
        MachineError: a check failed.
    """
    started = time.monotonic()  # before torch is imported, which takes a while
    from antransformer.lock import lock
    from antransformer.runs.provenance import command
    from antransformer.selftest import program
    from antransformer.selftest.checks import Setup
    from antransformer.training.device import choose_device

    if parsed.minutes is not None and not parsed.minutes >= program.MINUTES:
        raise ConfigError(f"--minutes must be at least {program.MINUTES:g}, the longest unit; got {parsed.minutes:g}")
    if len(set(parsed.parts)) < len(parsed.parts):
        raise ConfigError(f"--parts needs different names, got {' '.join(parsed.parts)}")
    if parsed.json:
        check_json_target("--json", parsed.json, lambda content: "parts" in content)
    device = choose_device(parsed.device)
    folder = parsed.out or Path("runs", f"selftest-{device.type}")
    if parsed.json and folder.absolute().is_relative_to(parsed.json.absolute()):
        raise ConfigError(f"--json {parsed.json} is the folder of --out: choose a file name")
    deadline = math.inf if parsed.minutes is None else started + 60 * parsed.minutes
    setup = Setup(device, folder, deadline, lambda text: print(text, file=sys.stderr, flush=True))
    console = TableConsole()
    if not console.is_terminal:
        console.width = TABLE_WIDTH

    def show(part: str, results: list[program.Result]) -> None:
        table = new_table("check", "figure", "limit", "result")
        table.title = f"{part}, {sum(result.seconds for result in results):.0f} s"
        for check in (check for result in results for check in result.checks):
            table.add_row(check.name, check.figure, check.limit, program.outcome(check))
        console.print(table)

    program.check_folder(setup)
    with lock(folder):
        results = program.run(setup, parsed.parts, show)
    if parsed.json:
        write_result(parsed.json, json.dumps(program.content(setup, results), indent=2) + "\n")
    source = program.source_digest()
    left = {part: len(program.pending(results, part, source)) for part in PARTS}
    checks = [check for result in results.values() if result.source for check in result.checks]
    failures = [check.name for check in checks if check.passed is False]
    if not any(left.values()):
        print((folder / program.REPORT).read_text(encoding="utf-8"))
    print(f"{list(left.values()).count(0)} of {len(PARTS)} parts, {counted(len(checks), 'figure')}; ", end="")
    print(f"tables: {folder / program.REPORT}")
    chosen = [part for part in parsed.parts or PARTS if left[part]]
    if chosen:
        unfinished = (f"{part} ({left[part]} of {len(program.CHECKS[part])})" for part in chosen)
        print(f"left: {', '.join(unfinished)}; run the same command again to continue: {command()}")
    if failures:
        raise MachineError(f"{counted(len(failures), 'check')} failed: {'; '.join(failures)}")
