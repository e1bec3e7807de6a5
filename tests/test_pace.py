"""Lines of progress: the first after a few seconds, then every half minute, none for short work."""

import io
import time

import pytest
from rich.console import Console

from antransformer import pace
from antransformer.pace import Pace, format_duration, heartbeat
from antransformer.progress import EvaluationProgress, ExperimentProgress, PrepareProgress, TrainingProgress, new_bar
from helpers.messages import mentions


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when its list's only number changes."""
    seconds = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: seconds[0])
    return seconds


def test_an_estimate_comes_early_and_then_a_line_each_half_minute(clock):
    lines = []
    show = Pace("work", "steps", lines.append)
    for step in range(101):
        clock[0] = 10.0 + 2 * step
        show(step, 100)
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [2, 17, 32, 47, 62, 77, 92]
    assert mentions(lines[1], 17, 100, "steps", 166 // 60 + 1)  # two seconds for each of 83 steps


def test_short_work_prints_nothing(clock):
    lines = []
    show = Pace("work", "steps", lines.append)
    for step in range(11):
        clock[0] = step / 4
        show(step, 10)
    clock[0] = 100
    show(10, 10)
    assert not lines


def test_only_the_estimate_is_printed_where_a_bar_shows_the_rest(clock):
    lines = []
    show = Pace("work", "steps", lines.append, repeat=False)
    for step in range(101):
        clock[0] = 2 * step
        show(step, 100)
    assert len(lines) == 1


def test_the_time_left_excludes_what_an_earlier_session_did(clock):
    lines = []
    show = Pace("work", "steps", lines.append)
    show(90, 100)
    clock[0] = 10
    show(91, 100)
    assert mentions(lines[0], 91, 100, 2)  # minutes, for nine steps of ten seconds


def test_the_time_left_of_an_experiment_excludes_what_an_earlier_call_did(clock, capsys):
    display = ExperimentProgress()
    display.plan(400, 3)
    capsys.readouterr()
    display.advance(100, earlier=True)  # a finished run
    clock[0] = 20.0  # workers start
    display.advance(1)
    display.advance(79, earlier=True)  # a resumed run
    clock[0] = 32.0
    display.advance(20)
    lines = "".join(capsys.readouterr()).splitlines()
    assert len(lines) == 1 and mentions(lines[0], 200, 400, 2)  # minutes: 20 tokens took 12 seconds


def test_a_restart_forgets_the_speed_before_it(clock):
    lines = []
    work = pace.Pace("training", "steps", lines.append)
    for second, done in ((0, 0), (2, 1)):  # a busy machine, on which 100 steps would take 200 seconds
        clock[0] = second
        work(done, 100)
    work.restart()
    for second in range(3, 8):
        clock[0] = second
        work((second - 2) * 10, 100)
    assert len(lines) == 1 and mentions(lines[0], 40, 100, 6)


@pytest.mark.parametrize(
    ("seconds", "number"), [(0, 1), (12.1, 13), (89, 89), (91, 2), (5399, 90), (5400, 1.5), (36_000, 10.0)]
)
def test_durations_are_rounded_up(seconds, number):
    assert mentions(format_duration(seconds), number)


def test_work_without_progress_has_a_heartbeat(monkeypatch):
    for name in ("ESTIMATE_SECONDS", "LINE_SECONDS"):
        monkeypatch.setattr(pace, name, 0.01)
    lines = []
    with heartbeat("packing", lines.append):
        while len(lines) < 3:
            time.sleep(0.01)
    count = len(lines)
    time.sleep(0.05)
    assert len(lines) == count and all("packing" in line for line in lines)


def advance(display, clock):
    """Report two minutes of work to a display."""
    display.__enter__()
    for second in range(121):
        clock[0] = float(second)
        if isinstance(display, TrainingProgress):
            display.step(second)
        elif isinstance(display, ExperimentProgress):
            display.advance(1)
        elif isinstance(display, PrepareProgress):
            display(second * 10**6, 200 * 10**6, second, second)
        else:
            display("a task", second, 200)
    display.__exit__(None, None, None)


def displays(enabled):
    experiment = ExperimentProgress(enabled)
    experiment.tokens = 200
    return [TrainingProgress(200, enabled), experiment, PrepareProgress("data", enabled), EvaluationProgress(enabled)]


@pytest.mark.parametrize("index", range(4))
def test_displays_print_at_least_every_half_minute_and_nothing_unless_enabled(clock, capsys, index):
    advance(displays(enabled=False)[index], clock)
    assert capsys.readouterr() == ("", "")
    clock[0] = 0.0
    advance(displays(enabled=True)[index], clock)
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert 4 <= len(lines) <= 5 and all(mentions(line, 200) for line in lines)


def test_a_bar_shows_brackets_in_the_name_of_a_file():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    bar = new_bar("{task.description}", console, enabled=True)
    bar.add_task("notes[draft].txt", numbers="1 [MB]")
    console.print(bar.get_renderable())
    assert mentions(console.file.getvalue(), "notes[draft].txt", "[MB]")
