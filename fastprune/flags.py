"""From a configuration dataclass to flags and back.

The words of a command line are read here: flags in kebab or snake case, lists comma-separated, and
`--config FILE.yaml` supplies values under the same names, converted alike. Every usage error is one
line. `--help` shows the docstrings under the fields.
"""

import ast
import dataclasses
import difflib
import inspect
import sys
import textwrap
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rich.panel import Panel
from rich.text import Text

from fastprune.bounds import check_ranges
from fastprune.config import POSITIONAL, Group
from fastprune.errors import InputError
from fastprune.output import check_apart
from fastprune.printing import Console
from fastprune.readers import read_yaml

C = TypeVar("C")

WIDTH = 100
"""Columns of the help text, at most."""
QUOTED = 100
"""Characters of a wrong value that an error repeats."""
HANGING = 23
"""Where the explanation of an option begins, unless all options are shorter."""


def parse(config_class: type[C], args: Sequence[str], prog: str) -> C:
    """The configuration that `args` (and the `--config` file among them) describe.

    Raises InputError with one line for any usage error, SystemExit(0) after printing `--help`.
    """
    args, file = _take_config(args)
    values = {} if file is None else _read_config(config_class, file, prog)
    if {"-h", "--help"}.intersection(args):
        print(_help(config_class, values, prog), end="")
        raise SystemExit(0)
    options = options_of(config_class)
    try:
        values |= _given(options, args)
        for option in options.values():
            if option.required and option.name not in values:
                raise InputError(f"missing {option.shown} ({option.about})")
    except InputError as error:
        raise InputError(f"{error}; see {prog} --help") from error
    config = config_class(**values)
    check_ranges(config)
    if file is not None and isinstance(out := getattr(config, "out", None), Path):
        check_apart(out, [file])
    return config


def group_of(hint: Any) -> Group | None:
    """The group in the metadata of an annotated type; None without one."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Group)), None)


# ---------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as it stands on a command line."""

    name: str
    hint: Any
    positional: bool
    owner: type[Any]
    default: Any = MISSING

    @property
    def shown(self) -> str:
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def usage(self) -> str:
        """What to write for it."""
        if self.positional:
            return self.shown if self.required else f"[{self.shown}]"
        if self.hint is bool:
            return f"{self.shown}, {self.shown[:2]}no-{self.shown[2:]}"
        return f"{self.shown} {_metavar(self.hint)}"

    @property
    def words(self) -> list[str]:
        """The flag, both forms of it where it is a switch."""
        return self.usage.split(", ") if self.switch else [self.shown]

    @property
    def switch(self) -> bool:
        """Whether it takes no value."""
        return self.hint is bool and not self.positional

    @property
    def choices(self) -> list[str]:
        """What its value may be, or each of its values; nothing where that is not a choice."""
        hint = self.hint
        while get_origin(hint) in (Union, types.UnionType, tuple, list):
            hint = _members(hint)[0]
        return [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []

    @property
    def about(self) -> str:
        """The docstring under the field."""
        return _about(self.owner, self.name)

    def remark(self, values: dict[str, Any]) -> str:
        """What the help text says of its default, by `values` or its own; nothing where leaving
        the option out says it all."""
        default = values.get(self.name, self.default)
        if default is MISSING:
            return " (required)"
        default = _listed(default) if isinstance(default, (tuple, list)) else default
        return "" if default in (None, "") or default is False else f" (default: {default})"

    def convert(self, text: str) -> Any:
        """`text` as the field's type. Raises InputError."""
        try:
            return _converted(self.hint, _checked(text))
        except ValueError as error:
            raise InputError(f"{self.shown}: {error}") from error


def options_of(config_class: type[Any]) -> dict[str, Option]:
    """The fields of a configuration by name."""
    plain, annotated = (
        get_type_hints(config_class, include_extras=extras) for extras in (False, True)
    )
    return {
        field.name: Option(
            field.name,
            plain[field.name],
            POSITIONAL in getattr(annotated[field.name], "__metadata__", ()),
            config_class,
            field.default if field.default_factory is MISSING else field.default_factory(),
        )
        for field in dataclasses.fields(config_class)
    }


def _given(options: dict[str, Option], args: Sequence[str]) -> dict[str, Any]:
    """The values that `args` give, by field name. Raises InputError."""
    flags = {o.shown: o for o in options.values() if not o.positional}
    switches = {
        f"--{no}{flag[2:]}": (option.name, not no)
        for flag, option in flags.items()
        if option.hint is bool
        for no in ("", "no-")
    }
    values: dict[str, Any] = {}
    loose = []
    words = iter(args)
    for word in words:
        if not _is_flag(word):
            loose.append(word)
            continue
        flag, equals, text = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in switches and not equals:
            name, values[name] = switches[flag]
        elif flag in switches:
            raise InputError(f"{flag} takes no value")
        elif flag in flags:
            if not equals and _is_flag(text := next(words, "--")):
                raise InputError(f"{flag} needs a value ({flag}=VALUE where it begins with -)")
            values[flags[flag].name] = flags[flag].convert(text)
        else:
            near = difflib.get_close_matches(flag, [*flags, *switches], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown option {_quoted(flag)[1:-1]}{hint}")
    return values | _placed([o for o in options.values() if o.positional], loose)


def _placed(options: Sequence[Option], words: list[str]) -> dict[str, Any]:
    """The values of positional options; one that is a list takes all the words that are left."""
    values: dict[str, Any] = {}
    for option in options:
        if words and get_origin(option.hint) is tuple:
            (member, *_) = get_args(option.hint)
            try:
                values[option.name] = tuple(_converted(member, _checked(word)) for word in words)
            except ValueError as error:
                raise InputError(f"{option.shown}: {error}") from error
            words = []
        elif words:
            values[option.name] = option.convert(words.pop(0))
    if words:
        raise InputError(f"unexpected argument {_quoted(words[0])}")
    return values


def _is_flag(word: str) -> bool:
    """Whether a word is a flag, and neither a value nor a negative number."""
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _members(hint: Any) -> list[Any]:
    return [m for m in get_args(hint) if m not in (types.NoneType, Ellipsis)]


def _converted(hint: Any, text: str) -> Any:
    """`text` as a value of the type `hint`; X | None takes an X. Raises ValueError."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _converted(_members(hint)[0], text)
    if origin in (tuple, list):
        words = (word.strip() for word in text.split(","))
        return origin(_converted(_members(hint)[0], word) for word in words if word)
    if origin is Literal or hint is bool:
        choices = (True, False) if hint is bool else get_args(hint)
        for choice in choices:
            if str(choice) == text:
                return choice
        raise ValueError(f"{_quoted(text)} is not one of {', '.join(map(str, choices))}")
    try:
        return hint(text)
    except ValueError:
        noun = "a whole number" if hint is int else "a number"
        raise ValueError(f"{_quoted(text)} is not {noun}") from None


def _checked(text: str) -> str:
    """`text` that a file can be named by and a tokenizer can encode. Raises ValueError."""
    if "\0" in text:
        raise ValueError(f"{_quoted(text)} holds a zero byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_quoted(text)} is not UTF-8 text") from None
    return text


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}…")


# ---------------------------------------------------------------------------- help


def _help(config_class: type[Any], values: dict[str, Any], prog: str) -> str:
    """The help text of a command: a box for each group of its options, `values` as defaults."""
    options = options_of(config_class)
    hints = get_type_hints(config_class, include_extras=True)
    boxes: dict[str, list[tuple[str, str]]] = {
        "positional arguments": [],
        "options": [("-h, --help", "show this help message and exit")],
        **{f"{group.value} options": [] for group in Group},
    }
    for name, option in options.items():
        group = group_of(hints[name])
        title = f"{group.value} options" if group else "options"
        row = option.usage, f"{option.about}{option.remark(values)}"
        boxes["positional arguments" if option.positional else title].append(row)
    console = Console()
    console.width = min(console.width, WIDTH)
    hanging = min(HANGING, 2 + max(len(usage) for rows in boxes.values() for usage, _ in rows))
    with console.capture() as shown:
        words = [option.usage for option in options.values() if option.positional]
        console.out(" ".join(["usage:", prog, "[-h] [OPTIONS]", *words]), highlight=False)
        console.out(f"\n{inspect.getdoc(config_class)}\n", highlight=False)
        console.out("Any of these may also stand in a YAML file: --config FILE.\n")
        for title, rows in boxes.items():
            if rows:
                lines = [_explained(*row, hanging, console.width - 4) for row in rows]
                box = Panel(Text("\n").join(lines), title=title, title_align="left")
                console.print(box)
    coding = sys.stdout.encoding or "utf-8"
    return shown.get().encode(coding, "replace").decode(coding)


def _explained(usage: str, about: str, hanging: int, width: int) -> Text:
    """What to write for an option and, beside or below it, what that does."""
    between = " " * (hanging - len(usage)) if len(usage) < hanging - 1 else "\n" + " " * hanging
    if len(usage) > width:  # many choices; they are parted at their commas
        words = usage.replace(",", ", ")
        usage = "\n".join(textwrap.wrap(words, max(width, 20), break_on_hyphens=False))
        usage = usage.replace(", ", ",")
    lines = textwrap.wrap(about, max(width - hanging, 20), break_on_hyphens=False)
    return Text.assemble((usage, "bold"), between, ("\n" + " " * hanging).join(lines))


def _metavar(hint: Any) -> str:
    """What stands for a value of the type `hint` in the help text."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _metavar(_members(hint)[0])
    if origin in (tuple, list):
        member = _metavar(_members(hint)[0])
        return member[1:-1] if member.startswith("{") else f"{member},…"
    return f"{{{_listed(get_args(hint))}}}" if origin is Literal else str(hint.__name__).upper()


def _listed(values: Iterable[Any]) -> str:
    return ",".join(map(str, values))


def _about(config_class: type[Any], name: str) -> str:
    """The docstring under the field `name`, on one line."""
    owner = next(c for c in config_class.__mro__ if name in vars(c).get("__annotations__", {}))
    return _abouts(owner).get(name, "")


@cache
def _abouts(owner: type[Any]) -> dict[str, str]:
    """The docstrings under the fields that the class ``owner`` defines itself, by field name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in pairwise(definition.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)):
            continue
        if isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = _one_line(str(text.value.value))
    return found


# ---------------------------------------------------------------------------- files


def _take_config(args: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split `--config FILE` off the other arguments."""
    rest: list[str] = []
    file = None
    words = iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise InputError("--config needs the name of a YAML file")
        file = Path(value)
    return rest, file


def _read_config(config_class: type, file: Path, prog: str) -> dict[str, Any]:
    """The options that the YAML `file` sets, by field name."""
    try:
        values = read_yaml(file)
    except InputError as error:
        raise InputError(f"--config {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {file}: must hold `option: value` lines")

    return typed_values(config_class, values, f"--config {file}", prog)


def typed_values(
    config_class: type, values: dict[Any, Any], where: str, prog: str
) -> dict[str, Any]:
    """`values` from a YAML file as the types of `config_class`'s fields, by field name.

    They are converted and checked as flags are. `where` names
    the file in an error, `prog` the command that lists the fields. Raises InputError.
    """
    options = options_of(config_class)
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise InputError(f"{where}: unknown option {_quoted(str(key))}; see {prog} --help")
        if name in seen:
            raise InputError(f"{where}: {key}: stands there twice, with - and with _")
        seen.add(name)
        given = value if isinstance(value, list) else [value]
        if any(isinstance(one, (dict, list)) for one in given):
            raise InputError(f"{where}: {key}: must be one value or a list")
        if value is None:
            continue
        text = ",".join(map(str, given))
        try:
            found[name] = options[name].convert(text)
        except InputError as error:
            raise InputError(f"{where}: {error}; see {prog} --help") from error
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
