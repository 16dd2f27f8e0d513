"""Completion: every flag of every command, as the shells themselves understand the scripts."""

import shlex
import shutil
import subprocess

import pytest

from fastprune import cli
from fastprune.flags import options_of

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def script(capsys):
    def of(shell):
        assert cli.main(["completion", shell, "--threads", "1"]) == 0
        return capsys.readouterr().out

    return of


def flags():
    for name, command in cli.COMMANDS.items():
        for option in options_of(cli._load(command.config)).values():
            if not option.positional:
                yield name, option


def completed(script, lines):
    """What bash offers for the last word of each of `lines`."""
    asked = [script]
    for words in lines:
        line = " ".join(shlex.quote(word) for word in words)
        asked.append(f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _fastprune")
        asked.append('echo "${COMPREPLY[@]}"')
    done = subprocess.run(
        ["bash", "-c", "\n".join(asked)], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_completes_commands_flags_and_choices(script):
    expected = {
        "co": ["compress", "compare", "completion"],
        "--v": ["--version"],
        "prune m --rat": ["--ratio", "--ratio-of"],
        "prune --layout ": ["per-layer", "uniform", "deci"],
        "prune --layout = u": ["uniform"],
        "completion z": ["zsh"],
        "prune ": [],  # bash itself offers files then
    }
    names = list(cli.COMMANDS)
    lines = [["fastprune", *line.split(" ")] for line in expected]
    lines += [["fastprune", name, "-"] for name in names]
    found = completed(script("bash"), lines)
    assert found[: len(expected)] == list(expected.values())
    offered = dict(zip(names, found[len(expected) :]))
    for name, option in flags():
        assert set(option.words) <= set(offered[name])


def test_fish_knows_every_flag_with_its_choices(script):
    lines = [shlex.split(line.replace("\\'", "")) for line in script("fish").splitlines()]
    known = {}
    for words in lines:
        if "-l" in words:
            known[words[4], words[words.index("-l") + 1]] = words
    for name, option in flags():
        for word in option.words:
            words = known[f"__fish_seen_subcommand_from {name}", word[2:]]
            assert option.switch != bool({"-r", "-x"} & set(words))
            if option.choices:
                assert " ".join(option.choices) in words


def test_zsh_knows_every_flag_with_its_choices(script):
    text = script("zsh")
    parts = {name: text.split(f"\n        {name})\n")[1].split(";;")[0] for name in cli.COMMANDS}
    for name, option in flags():
        for word in option.words:
            assert f"'{word}[" in parts[name]
        assert " ".join(option.choices) in parts[name]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_can_read_its_script(script, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(script(shell))
    subprocess.run([shell, "-n", file], check=True)


def test_a_missing_or_an_unknown_shell_is_one_line(capsys):
    assert cli.main(["completion"]) == 2
    assert "missing SHELL (bash, zsh or fish)" in capsys.readouterr().err
    assert cli.main(["completion", "csh"]) == 2
    assert "SHELL: 'csh' is not one of bash, zsh, fish" in capsys.readouterr().err
