"""Scripts that make a shell complete commands, flags and choices, made from the configurations."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from fastprune.cli import COMMANDS
from fastprune.config import CommonConfig, Positional
from fastprune.flags import Option, options_of

ABOUT = 90
"""Characters of an explanation, at most."""
GLOBAL = ("--help", "--version")


@dataclass(kw_only=True)
class CompletionConfig(CommonConfig):
    """Print a script that makes a shell complete commands, options and choices.

    Write it to ~/.local/share/bash-completion/completions/fastprune for bash, to the file
    _fastprune in a folder of $fpath for zsh, and to ~/.config/fish/completions/fastprune.fish for
    fish. For example:
        fastprune completion bash
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish"""


@dataclass(frozen=True)
class _Command:
    name: str
    summary: str
    options: Sequence[Option]

    @property
    def flags(self) -> list[str]:
        """Every flag that it takes, both forms of a switch."""
        own = [word for option in self.options if not option.positional for word in option.words]
        return [*own, "--config", "--help"]


def run_completion(config: CompletionConfig) -> dict[str, str]:
    """The script for the shell that ``config`` names: the `completion` command."""
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[config.shell]
    return {"shell": config.shell, "script": "\n".join(write(_commands())) + "\n"}


def show_completion(result: dict[str, str]) -> None:
    """The script alone, for a shell to read."""
    print(result["script"], end="")


def _commands() -> list[_Command]:
    found = []
    for name, command in COMMANDS.items():
        module, _, config = command.config.partition(":")
        options = options_of(getattr(import_module(module), config))
        found.append(_Command(name, command.summary, list(options.values())))
    return found


def _bash(commands: Sequence[_Command]) -> Iterator[str]:
    names = " ".join([*(command.name for command in commands), *GLOBAL])
    yield from [
        "_fastprune() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        # bash parts --flag=value at the =.
        '    [[ $word == "=" ]] && word=""',
        '    [[ $before == "=" ]] && before="${COMP_WORDS[COMP_CWORD-2]}"',
        '    case "${COMP_WORDS[1]}:$before" in',
    ]
    for command in commands:
        for option in command.options:
            if option.choices:  # those of a positional come right after the command
                before = command.name if option.positional else option.shown
                choices = " ".join(option.choices)
                yield f'        {command.name}:{before}) words="{choices}" ;;'
    yield from [
        "    esac",
        "    if (( COMP_CWORD == 1 )); then",
        f'        words="{names}"',
        "    elif [[ $word == -* ]]; then",
        '        case "${COMP_WORDS[1]}" in',
    ]
    for command in commands:
        yield f'            {command.name}) words="{" ".join(command.flags)}" ;;'
    yield from [
        "        esac",
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _fastprune fastprune",  # default: files
    ]


def _zsh(commands: Sequence[_Command]) -> Iterator[str]:
    yield from ["#compdef fastprune", "_fastprune() {", "    local -a commands", "    commands=("]
    for command in commands:
        yield f"        {_quoted(f'{command.name}:{command.summary}')}"
    yield from [
        "    )",
        "    if (( CURRENT == 2 )); then",
        "        _describe command commands",
        "        compadd -- " + " ".join(GLOBAL),
        "        return",
        "    fi",
        "    local chosen=$words[2]",
        "    shift words",
        "    (( CURRENT-- ))",
        "    case $chosen in",
    ]
    for command in commands:
        yield f"        {command.name})"
        yield "            _arguments \\"
        for option in command.options:
            value = f"({' '.join(option.choices)})" if option.choices else "_files"
            if option.positional:
                yield f"                {_quoted(f':{option.name}:{value}')} \\"
                continue
            about = _about(option).translate({ord(c): f"\\{c}" for c in "[]:\\"})
            end = "" if option.switch else f":{option.name}:{value}"
            for word in option.words:
                yield f"                {_quoted(f'{word}[{about}]{end}')} \\"
        yield "                '--config[options in a YAML file]:file:_files' \\"
        yield "                '--help[show the options]' \\"
        yield "                '*:file:_files' ;;"
    yield from [
        "    esac",
        "}",
        "if [[ $funcstack[1] == _fastprune ]]; then  # found in $fpath, and called",
        '    _fastprune "$@"',
        "else",
        "    compdef _fastprune fastprune",
        "fi",
    ]


def _fish(commands: Sequence[_Command]) -> Iterator[str]:
    start = "complete -c fastprune"
    for word in GLOBAL:
        yield f"{start} -n __fish_use_subcommand -l {word[2:]}"
    for command in commands:
        about = _fish_quoted(command.summary)
        yield f"{start} -n __fish_use_subcommand -f -a {command.name} -d {about}"
    for command in commands:
        here = f"{start} -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            choices = f" -x -a '{' '.join(option.choices)}'" if option.choices else ""
            about = f" -d {_fish_quoted(_about(option))}"
            if option.positional and choices:
                yield f"{here}{choices}{about}"
            elif not option.positional:
                value = "" if option.switch else choices or " -r"
                for word in option.words:
                    yield f"{here} -l {word[2:]}{value}{about}"
        yield f"{here} -l config -r -d 'options in a YAML file'"
        yield f"{here} -l help -d 'show the options'"


def _about(option: Any) -> str:
    return textwrap.shorten(option.about, ABOUT, placeholder=" …")


def _quoted(text: str) -> str:
    """A word for zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
