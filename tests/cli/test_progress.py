"""Bars and spinners: silent when quick or quiet, plain lines where there is no terminal."""

import io
import logging
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastprune import progress

PATIENCE = 250
"""Seconds after which a line that has not come counts as missing: only so that a failure ends."""


@pytest.fixture
def screen(monkeypatch):
    """A console into a string, shown at once; a terminal or not as the test asks."""

    def make(terminal: bool, delay: float = 0.0) -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=terminal))
        monkeypatch.setattr(progress, "DELAY", delay)
        monkeypatch.setattr(progress, "INTERVAL", 3600.0)
        monkeypatch.setattr(progress, "_voices", progress._Voices())
        return text

    return make


def test_items_pass_through(screen):
    screen(terminal=True)
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert list(progress.track(iter("ab"), "spelling", total=2)) == ["a", "b"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; the test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_bar_on_a_terminal(screen, clock):
    text = screen(terminal=True)
    for _ in progress.track(range(3), "counting"):
        clock[0] += 1
    assert "counting" in text.getvalue()


@pytest.fixture
def heard():
    """Wait until a line says just this; the lines so far."""
    lines, changed = [], threading.Condition()

    def note(record):
        with changed:
            lines.append(record.getMessage())
            changed.notify_all()

    def wait(line: str) -> list[str]:
        with changed:
            came = changed.wait_for(lambda: line in lines, timeout=PATIENCE)
            assert came, f"{line!r} is not among {lines}"
            return lines[:]

    handler, log = logging.Handler(), progress.log
    handler.emit = note
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield wait
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_plain_line_elsewhere(screen, heard):
    text = screen(terminal=False)
    for _ in progress.track(range(3), "counting"):
        lines = heard("counting: 0 of 3 so far")
        assert len(lines) == 1  # the next is due after INTERVAL
    assert text.getvalue() == ""


def test_further_lines_say_what_is_left(screen, heard, clock, monkeypatch):
    screen(terminal=False)
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    for number in progress.track(range(7), "counting"):
        clock[0] = 100.0 + 30 * number
        if number == 1:
            heard("counting: 1 of 7 so far, about 3:00 left")
        if number == 6:
            heard("counting: 6 of 7 so far, about 0:30 left")


def test_a_run_that_is_continued_counts_what_came_before(screen, heard, clock, monkeypatch):
    screen(terminal=False)
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    for number in progress.track(range(80, 100), "training", total=100, done=80):
        if number == 80:
            heard("training: 80 of 100 so far")
        if number == 82:
            clock[0] += 10
            heard("training: 82 of 100 so far, about 1:30 left")
            break


def test_lines_without_a_total(screen, heard):
    screen(terminal=False)
    for _ in progress.track(iter(range(3)), "counting"):
        heard("counting: 0 so far")


def test_the_innermost_step_speaks(screen, heard, clock):
    screen(terminal=False)
    with progress.phase("plan"):
        heard("plan …, 0:00 so far")
        for _ in progress.track(range(2), "searching"):
            lines = heard("searching: 0 of 2 so far")
    assert lines == ["plan …, 0:00 so far", "searching: 0 of 2 so far"]


def test_a_step_is_heard_while_those_inside_are_too_short_to_be(screen, heard, clock, monkeypatch):
    screen(terminal=False)
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with progress.phase("plan"):
        heard("plan …, 0:00 so far")
        monkeypatch.setattr(progress, "DELAY", 3600.0)
        for _ in progress.track(range(1), "evaluating"):
            clock[0] += 30
            lines = heard("plan …, 0:30 so far")
    assert not any("evaluating" in line for line in lines)


def test_nothing_when_quick_or_quiet(screen, caplog):
    text = screen(terminal=True, delay=3600.0)
    with caplog.at_level(logging.INFO, "fastprune"):
        list(progress.track(range(3), "counting"))
        with progress.stage("thinking"):
            pass
    text_quiet = screen(terminal=True)
    progress.console.quiet = True
    list(progress.track(range(3), "counting"))
    with progress.stage("thinking"):
        pass
    assert (text.getvalue(), text_quiet.getvalue(), caplog.records) == ("", "", [])


def test_a_stage_announces_itself_after_the_delay(screen, heard, clock):
    screen(terminal=False)
    with progress.stage("thinking"):
        lines = heard("thinking …, 0:00 so far")
    assert lines == ["thinking …, 0:00 so far"]
