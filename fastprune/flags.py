"""From a configuration dataclass to flags and back: tyro derives the parser, this file the manners.

What it adds to tyro: a usage error is one line instead of a box, numbers and optional values are
named plainly in it, lists are comma-separated, and `--config FILE.yaml` supplies defaults under the
same names as the flags.
"""

import contextlib
import dataclasses
import inspect
import io
import re
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_type_hints

import tyro
import yaml
from tyro.conf import FlagConversionOff, OmitArgPrefixes, PositionalMetavarFromFieldName
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fastprune.config import Group
from fastprune.errors import InputError
from fastprune.output import check_apart

C = TypeVar("C")

registry = ConstructorRegistry()


@registry.primitive_rule
def number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """int and float whose errors name the value instead of Python's conversion."""
    if info.type not in (int, float):
        return None
    noun = "a whole number" if info.type is int else "a number"

    def parse(args: list[str]) -> Any:
        try:
            return info.type(args[0])
        except ValueError:
            raise ValueError(f"{args[0]!r} is not {noun}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, (int, info.type)),
        str_from_instance=lambda value: [str(value)],
    )


@registry.primitive_rule
def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`X | None`: a flag that takes an X and may be left out; the word None is not a value."""
    if info.type_origin not in (Union, types.UnionType):
        return None
    inner = [member for member in get_args(info.type) if member is not types.NoneType]
    if len(inner) != 1:
        return None
    spec = registry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda v: [] if v is None else spec.str_from_instance(v),
    )


@registry.primitive_rule
def comma_separated(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`tuple[X, ...]` and `list[X]` as one comma-separated value; positional lists stay spaced."""
    if info.type_origin not in (tuple, list) or tyro.conf.Positional in info.markers:
        return None
    members = [member for member in get_args(info.type) if member is not Ellipsis]
    if len(members) != 1:
        return None
    spec = registry.get_primitive_spec(PrimitiveTypeInfo.make(members[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    container = info.type_origin

    def parse(args: list[str]) -> Any:
        words = [word.strip() for word in args[0].split(",") if word.strip()]
        for word in words:
            if spec.choices is not None and word not in spec.choices:
                raise ValueError(f"{word!r} is not one of {', '.join(spec.choices)}")
        return container(spec.instance_from_str([word]) for word in words)

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=",".join(spec.choices) if spec.choices else f"{spec.metavar},…",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, container),
        str_from_instance=lambda v: [",".join(spec.str_from_instance(x)[0] for x in v)],
    )


def parse(config_class: type[C], args: Sequence[str], prog: str) -> C:
    """The configuration that `args` (and the `--config` file among them) describe.

    Raises InputError with one line for any usage error, SystemExit(0) after printing `--help`.
    """
    args, file = _take_config(args)
    values = {} if file is None else _read_config(config_class, file, prog)
    about = inspect.getdoc(config_class) or ""
    about += "\n\nAny of these may also stand in a YAML file: --config FILE."
    markers = (PositionalMetavarFromFieldName, OmitArgPrefixes)
    parsed = _tyro(_presented(config_class, values), args, prog, about, markers)
    config: C = _flattened(config_class, parsed)
    if file is not None and isinstance(out := getattr(config, "out", None), Path):
        check_apart(out, [file])
    return config


def group_of(hint: Any) -> Group | None:
    """The group in the metadata of an annotated type; None without one."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Group)), None)


def _presented(config_class: type[Any], values: dict[str, Any]) -> type[Any]:
    """A throw-away class for one parse, with `values` as defaults.

    Fields of a group are in a dataclass of their own below it, which heads a box of the help text.
    """
    groups: dict[Group | None, list[str]] = {None: []}
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        groups.setdefault(group_of(hints[field.name]), []).append(field.name)
    nested = []
    for group in Group:
        if names := groups.get(group):
            part, box = _part(config_class, names, values), tyro.conf.arg(name=group.value)
            nested.append((_member(group), Annotated[part, box]))
    return _part(config_class, groups[None], values, nested)


def _part(
    config_class: type[Any],
    names: Sequence[str],
    values: dict[str, Any],
    nested: Sequence[tuple[str, Any]] = (),
) -> type[Any]:
    """A dataclass of the fields `names` alone, with their help texts, and of the `nested` ones."""
    hints = get_type_hints(config_class, include_extras=True)
    members: list[Any] = []
    for field in dataclasses.fields(config_class):
        default, factory = field.default, field.default_factory
        if field.name in values:
            default, factory = dataclasses.MISSING, partial(values.get, field.name)
        elif field.name not in names:
            default, factory = None, dataclasses.MISSING
        hint: Any = Annotated[hints[field.name], tyro.conf.arg(help_behavior_hint=_default_hint)]
        copy: Any = dataclasses.field(default=default, default_factory=factory)
        members.append((field.name, hint, copy))
    shown: Any = dataclasses.make_dataclass(  # its base has the docstrings, which are the help
        config_class.__name__, [*members, *nested], bases=(config_class,), kw_only=True
    )
    shown.__doc__ = ""
    listed = {*names, *(name for name, _ in nested)}
    fields = shown.__dataclass_fields__
    shown.__dataclass_fields__ = {name: fields[name] for name in fields if name in listed}
    return shown


def _member(group: Group) -> str:
    return f"group_{group.name.lower()}"


def _flattened(config_class: type[Any], parsed: Any) -> Any:
    """The configuration whose fields lie in `parsed` and in its groups."""
    parts = [parsed, *(getattr(parsed, _member(group), None) for group in Group)]
    found = {
        f.name: getattr(part, f.name) for part in parts if part for f in dataclasses.fields(part)
    }
    return config_class(**{f.name: found[f.name] for f in dataclasses.fields(config_class)})


def _default_hint(default: str) -> str:
    """What the help text says of a default; nothing where leaving the option out says it all."""
    return "" if default in ("", "''", "False") else f"(default: {default})"


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
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: cannot be read: {_reason(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {file}: not YAML: {_one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {file}: must hold `option: value` lines")

    return typed_values(config_class, values, f"--config {file}", prog)


def typed_values(
    config_class: type, values: dict[Any, Any], where: str, prog: str
) -> dict[str, Any]:
    """`values` from a YAML file as the types of `config_class`'s fields, by field name.

    They go through the same parser as flags, so they are checked and converted alike. `where` names
    the file in an error, `prog` the command that lists the fields. Raises InputError.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    args: list[str] = []
    names: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise InputError(f"{where}: unknown option {key!r}; see {prog} --help")
        if isinstance(value, dict):
            raise InputError(f"{where}: {key}: must be one value or a list")
        if value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        names.append(name)
        args.append(f"--{name}={text}")

    plain = get_type_hints(config_class)
    flags_only = dataclasses.make_dataclass("File", [(name, plain[name]) for name in names])
    try:
        parsed = _tyro(flags_only, args, prog, None, markers=(FlagConversionOff,))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error

    return {name: getattr(parsed, name) for name in names}


def _tyro(
    target: Any, args: Sequence[str], prog: str, description: str | None, markers: Any = ()
) -> Any:
    """tyro.cli, its framed error message turned into one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                target,
                args=args,
                prog=prog,
                description=description,
                config=markers,
                registry=registry,
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise InputError(_usage_error(stderr.getvalue(), prog)) from None


def _usage_error(framed: str, prog: str) -> str:
    """One line out of tyro's box: its first paragraph and the flag it suggests, if any.

    The box is drawn with lines or, where stdout is not UTF-8, with dashes: title, rule, paragraphs.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", framed)
    rows = [row.strip("╭╮╰╯│─ ") for row in plain.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for row in rows:
        if row.strip("-"):
            paragraphs[-1].append(row)
        elif paragraphs[-1]:
            paragraphs.append([])
    if "─" in plain:  # the title shares its row with the rule
        paragraphs.insert(0, [paragraphs[0].pop(0)])
    title, text, *rest = (_one_line(" ".join(rows)) for rows in [*paragraphs, [""]])

    text = text.removeprefix("Error parsing ").rstrip(".")
    if title == "Required options":
        name, _, about = text.removeprefix(f"Missing from {prog}: ").partition(" ")
        if name.startswith("--"):
            about = about.partition(" ")[2]  # the kind of value stands between
        text = f"missing {name} ({about.removesuffix(' (required)')})"
    suggestion = re.search(r"Perhaps you meant: (--[\w-]+)", " ".join(rest))
    if suggestion:
        text += f"; did you mean {suggestion[1]}?"
    return f"{text}; see {prog} --help"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not text"
