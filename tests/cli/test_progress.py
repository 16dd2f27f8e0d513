"""Bars and spinners: silent when quick or quiet, plain lines where there is no terminal."""

import io
import logging
import time

import pytest
from rich.console import Console

from fastprune import progress


@pytest.fixture
def screen(monkeypatch):
    """A console into a string, shown at once; a terminal or not as the test asks."""

    def make(terminal: bool, delay: float = 0.0) -> io.StringIO:
        text = io.StringIO()
        monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=terminal))
        monkeypatch.setattr(progress, "DELAY", delay)
        return text

    return make


def test_items_pass_through(screen):
    screen(terminal=True)
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert list(progress.track(iter("ab"), "spelling", total=2)) == ["a", "b"]


def test_a_bar_on_a_terminal(screen, caplog):
    text = screen(terminal=True)
    with caplog.at_level(logging.INFO, "fastprune"):
        for _ in progress.track(range(3), "counting"):
            pass
    assert "counting" in text.getvalue()


def test_a_plain_line_elsewhere(screen, caplog):
    text = screen(terminal=False)
    with caplog.at_level(logging.INFO, "fastprune"):
        for _ in progress.track(range(3), "counting"):
            pass
    assert text.getvalue() == ""
    assert [record.message for record in caplog.records] == [
        "counting: 1 of 3 so far, about 0:00 left"
    ]


def test_further_lines_say_what_is_left(screen, caplog, monkeypatch):
    screen(terminal=False)
    now = iter([0.0, 30, 60, 95, 120, 150, 190, 210])  # before all, then after each of seven
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(progress, "INTERVAL", 60.0)
    with caplog.at_level(logging.INFO, "fastprune"):
        assert list(progress.track(range(7), "counting")) == list(range(7))
    assert [record.message for record in caplog.records] == [
        "counting: 1 of 7 so far, about 3:00 left",
        "counting: 3 of 7 so far, about 2:07 left",
        "counting: 6 of 7 so far, about 0:32 left",
    ]


def test_lines_without_a_total(screen, caplog):
    screen(terminal=False)
    with caplog.at_level(logging.INFO, "fastprune"):
        list(progress.track(iter(range(3)), "counting"))
    assert [record.message for record in caplog.records] == ["counting: 1 so far"]


def test_nothing_when_quick_or_quiet(screen, caplog):
    text = screen(terminal=True, delay=60)
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


def test_a_stage_announces_itself_after_the_delay(screen, caplog):
    screen(terminal=False)
    with caplog.at_level(logging.INFO, "fastprune"), progress.stage("thinking"):
        deadline = time.monotonic() + 30  # only so that a failure ends
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.005)
    assert [record.message for record in caplog.records] == ["thinking …"]
