"""Every command and every flag that the documents name exists, and its values are accepted."""

import re
import shlex
from pathlib import Path

import pytest

from fastprune.bounds import check_ranges
from fastprune.cli import COMMANDS, _load
from fastprune.flags import options_of, parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(DOCS / "index.md", DOCS / "concepts.md", DOCS / "benchmarks.md"),
    *sorted(DOCS.glob("start/*.md")),
    *sorted(set(DOCS.glob("guides/*.md")) - {DOCS / "guides" / "migration.md"}),  # run elsewhere
    *sorted(DOCS.glob("reference/*.md")),
]
OTHERS = {
    *("--help", "--version", "--config"),  # of every command, and no field of a configuration
    *("--node-rank", "--use_fsdp", "--model", "--model_args", "--no-deps", "--index-url"),
}
"""Flags of `fastprune` itself, and of torchrun, accelerate, lm-evaluation-harness and pip."""


def configuration(command):
    return _load(COMMANDS[command].config)


def flags_of(command):
    """The flags of a command, switches with their opposites."""
    options = options_of(configuration(command)).values()
    shown = {option.shown for option in options if option.shown.startswith("--")}
    return shown | {f"--no-{flag[2:]}" for flag in shown}


EVERY = set.union(*map(flags_of, COMMANDS)) | OTHERS


def blocks_and_rest(page):
    """The code blocks of a page, and its text without them."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
    return pattern.findall(text), pattern.sub("", text)


def commands_in(page):
    """The arguments of every command that stands on a line of a code block."""
    for block in blocks_and_rest(page)[0]:
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:.*-m )?fastprune (?!COMMAND)(\w.*)", line)
            if found:
                yield shlex.split(found[1].partition(" > ")[0], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_code_blocks_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    Path("settings.yaml").write_text("".join(settings))  # which a --config names
    for command, *args in commands_in(page):
        assert command in COMMANDS, (command, args)
        config = parse(configuration(command), args, f"fastprune {command}")
        check_ranges(config)
        if command in ("prune", "compress"):
            config.check()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_in_the_text_exist(page):
    for code in re.findall(r"`(?!python |tools/)([^`\n]+)`", blocks_and_rest(page)[1]):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        named = re.match(r"(?:fastprune )?(\w+) ", code)
        own = named is not None and named[1] in COMMANDS
        assert flags <= (flags_of(named[1]) | OTHERS if own else EVERY), code


def test_commands_are_found():
    """The two tests above look at something."""
    found = [command for page in PAGES for command, *_ in commands_in(page)]
    assert len(found) > 30
    assert set(found) >= COMMANDS.keys() - {"chat", "compare"}
