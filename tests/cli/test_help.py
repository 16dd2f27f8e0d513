"""What `--help` of each command says first, and where its options stand."""

import io
import re
import shlex
from typing import get_type_hints

import pytest

from fastprune import cli
from fastprune.config import POSITIONAL, Group
from fastprune.flags import group_of, parse

COMMANDS = list(cli.COMMANDS)
MOST_FIRST = 14
"""Options of a command that stand before those in groups, at most."""


@pytest.fixture
def help_of(monkeypatch):
    """The help text of a command, as a stdout shows it that knows the characters of boxes."""

    def run(name: str) -> str:
        shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", shown)
            assert cli.main([name, "--help"]) == 0
            shown.flush()
        return shown.buffer.getvalue().decode()

    return run


def boxes(text: str) -> dict[str, list[str]]:
    """The flags of each box of a help text, without the --no- form of a switch."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.fullmatch(r"╭─ (.*?) ─+╮", line):
            flags = found.setdefault(title[1], [])
        elif flag := re.match(r"│ (--[\w-]+)", line):
            flags.append(flag[1])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_group(name, help_of):
    """The few that most people need come first; the groups follow in their order."""
    found = boxes(help_of(name))
    hints = get_type_hints(cli._load(cli.COMMANDS[name].config), include_extras=True)
    wanted: dict[str, list[str]] = {}
    for option, hint in hints.items():
        if POSITIONAL not in getattr(hint, "__metadata__", ()):
            group = group_of(hint)
            title = "options" if group is None else f"{group.value} options"
            wanted.setdefault(title, []).append(f"--{option.replace('_', '-')}")
    found.pop("positional arguments", None)
    assert {title: sorted(flags) for title, flags in found.items() if flags} == {
        title: sorted(flags) for title, flags in wanted.items()
    }
    order = ["options", *(f"{group.value} options" for group in Group)]
    assert list(found) == [title for title in order if title in found]
    assert len(found["options"]) <= MOST_FIRST


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_examples_that_parse(name, help_of):
    beginning = help_of(name).partition("╭─")[0]
    examples = [line for line in beginning.splitlines() if line.startswith("    fastprune")]
    assert 1 <= len(examples) <= 3
    for example in examples:
        _, command, *args = shlex.split(example)
        assert command == name
        config = parse(cli._load(cli.COMMANDS[name].config), args, f"fastprune {name}")
        if name in ("prune", "finetune"):  # others look for the harness of --tasks
            config.check()
