"""The command line as a Markdown page, from the configuration dataclasses.

    python tools/command_reference.py > commands.md

Commands, groups and texts are those of `--help`. As a hook of mkdocs it adds the page
`reference/commands.md` to the site, so that no copy of it can grow stale.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_type_hints

from fastprune.cli import COMMANDS, Command
from fastprune.config import Group, Positional
from fastprune.flags import group_of

PAGE = "reference/commands.md"
POSITIONAL = get_type_hints(
    dataclasses.make_dataclass("_", [("x", Positional[str])]), include_extras=True
)["x"].__metadata__[0]


def page() -> str:
    """The whole page."""
    parts = [
        "# Command line",
        "All options of a command may also stand in a YAML file: `--config FILE`.",
    ]
    for name, command in COMMANDS.items():
        parts += [f"## {name}", *_command(command)]
    return "\n\n".join(parts) + "\n"


def _command(command: Command) -> Iterator[str]:
    """The text of one command: what it is for, then a table for each group of options."""
    module, _, name = command.config.partition(":")
    config = getattr(import_module(module), name)
    about, _, examples = (inspect.getdoc(config) or "").partition("For example:\n")
    yield about.strip()
    if examples.strip():
        yield f"```\n{textwrap.dedent(examples).strip()}\n```"
    texts, hints = _texts(config), get_type_hints(config, include_extras=True)
    rows: dict[Group | None, list[str]] = {}
    for field in dataclasses.fields(config):
        rows.setdefault(group_of(hints[field.name]), []).append(
            _row(field, hints[field.name], texts.get(field.name, ""))
        )
    for group in (None, *Group):
        if group in rows:
            title = f"**{group.value[:1].upper()}{group.value[1:]} options**" if group else ""
            table = "\n".join(["| option | meaning |", "|---|---|", *rows[group]])
            yield f"{title}\n\n{table}".strip()


def _row(field: Any, hint: Any, text: str) -> str:
    positional = POSITIONAL in getattr(hint, "__metadata__", ())
    flag = field.name.upper() if positional else "--" + field.name.replace("_", "-")
    default = "" if field.default in (dataclasses.MISSING, None, False, "") else field.default
    default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    meaning = " ".join(text.split()) + (f" (default: `{default}`)" if default != "" else "")
    cells = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in (f"`{flag}`", meaning))
    return f"| {' | '.join(cells)} |"


def _texts(config: type[Any]) -> dict[str, str]:
    """The docstring under each field of `config` and of its bases, by the field's name."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                value = after.value if isinstance(after, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[statement.target.id] = inspect.cleandoc(value.value)
    return found


def on_files(files: Any, config: Any) -> Any:
    """The hook of mkdocs: add the page to the `files` of the site."""
    from mkdocs.structure.files import File  # only there when the site is built

    files.append(File.generated(config, PAGE, content=page()))
    return files


if __name__ == "__main__":
    print(page(), end="")
