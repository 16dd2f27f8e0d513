"""Control characters and markup from outside are shown on every way to people."""

import io
import logging

import pytest
from rich.table import Table
from rich.text import Text

from fastprune import cli, progress
from fastprune.printing import CONTROL, MAX_LINE, Console, LogFormatter, one_line, visible

EVIL = "\x1b[2J\x07\x9b31m\u202e[/x][bold]\ud800"
SHOWN = r"\x1b[2J\x07\x9b31m\u202e[/x][bold]\ud800"


def test_what_a_terminal_obeys_is_written_as_an_escape():
    assert visible(EVIL) == SHOWN
    assert visible(SHOWN) == SHOWN
    assert visible("一行\t你好 – é 😀\n") == "一行\t你好 – é 😀\n"


def test_a_long_line_is_cut_in_its_middle():
    line = one_line("begin " + "x" * 10**6 + "\nend")
    assert len(line) <= MAX_LINE + 3
    assert line.startswith("begin x")
    assert line.endswith("x end")


def test_a_log_message_is_one_line():
    record = logging.LogRecord("a", logging.INFO, "", 0, "read %s", ("a\nb\x1b[0m",), None)
    assert LogFormatter("%(message)s").format(record) == r"read a b\x1b[0m"


@pytest.fixture
def console():
    out = io.StringIO()
    return Console(file=out, width=100, force_terminal=True, color_system=None), out


def test_a_table_shows_it(console):
    console, out = console
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    assert out.getvalue().count(SHOWN) == 3
    assert not CONTROL.search(out.getvalue())


def test_a_text_shows_it(console):
    console, out = console
    console.print(Text(EVIL), soft_wrap=True)
    assert not CONTROL.search(out.getvalue())
    assert r"\x1b[2J\x9b31m\u202e[/x][bold]\ud800" in out.getvalue()  # rich drops the bell itself


def test_a_bar_shows_it(console, monkeypatch):
    console, out = console
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "console", console)
    assert list(progress.track(range(3), EVIL)) == [0, 1, 2]
    assert r"\x1b[2J\x9b31m" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()


def test_an_error_of_the_command_line_shows_it(capsys):
    assert cli.main(["eval", "a\x1b[2J[/x]\u202e\nb"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert r"a\x1b[2J[/x]\u202e b" in line
