"""JSON and YAML from outside, read within limits.

Both formats can describe far more than their files are long, or more than Python's own parsers
bear: nesting without end, numbers of thousands of digits, aliases of aliases. Every JSON and YAML
file that a user may have written or changed is read here, and what breaks a limit is refused like
any other malformed file. A key that stands twice is refused too, because one of its values would
be lost without a word.
"""

from __future__ import annotations

import ctypes
import json
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastprune.errors import InputError

T = TypeVar("T")

MAX_BYTES = 1 << 28
"""Size of a JSON file that is read as a whole."""
MAX_YAML_BYTES = 1 << 18
"""Size of a YAML file, whose parser is slow."""
MAX_DEPTH = 100
"""Lists and objects one inside the other."""
MAX_DIGITS = 40
"""Digits of a whole number: more than 64 bits have, so that such a number can still be named."""
MAX_NODES = 20_000
"""Values in a YAML file, those that aliases repeat counted again."""
_OTHERWISE = ("timestamp", "int", "float")
_WHOLE = re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_DECIMAL = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
"""How numbers are written in YAML, without those of base 60."""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON escapes the half of a character."""
LEAST_WAIT = 0.01
"""Seconds between two looks at a clock that stands still while its thread has no processor."""


# ------------------------------------------------------------------------------------------- JSON


def read_json(file: str | Path, limit: int = MAX_BYTES) -> Any:
    """The content of the JSON `file`. Raises InputError, naming it, where it is missing,
    unreadable, larger than `limit` bytes, or not JSON within the limits of this module."""
    text = read_text(file, limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from error


def parse_json(text: str | bytes, *, halves: bool = False) -> Any:
    """The value that `text` describes. ValueError where it is not JSON or breaks a limit.

    `halves` lets strings hold halves of characters (lone surrogates), for a caller that looks for
    them itself: no text with one can be encoded.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    with _within_limits():
        value = _DECODER.decode(text)
    _check(text, value, halves)
    return value


def parse_json_values(text: str, *, halves: bool = False) -> list[Any]:
    """The values that stand one after the other in `text`, each on as many lines as it likes.

    `halves` and ValueError as of `parse_json`.
    """
    values = []
    position = _after_blanks(text, 0)
    while position < len(text):
        with _within_limits():
            value, position = _DECODER.raw_decode(text, position)
        values.append(value)
        position = _after_blanks(text, position)
    _check(text, values, halves)
    return values


@contextmanager
def _within_limits() -> Iterator[None]:
    """ValueError for what a parser cannot bear."""
    try:
        yield
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except MemoryError as error:
        raise ValueError("it is too large for the memory of this machine") from error


def _after_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return content


def _integer(digits: str, base: int = 10) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number in it has {len(digits)} digits")
    return int(digits, base)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _check(text: str, value: Any, halves: bool) -> None:
    """ValueError where `value`, parsed from `text`, is nested too deeply or, unless `halves` are
    allowed, holds one."""
    if text.count("[") + text.count("{") > MAX_DEPTH:  # else it cannot be too deep
        _check_depth(value)
    if not halves and SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a string in it holds half of a surrogate pair") from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


# ------------------------------------------------------------------------------------------- YAML


def read_yaml(file: str | Path) -> Any:
    """The content of the YAML `file`. Raises InputError, naming it, where it is missing,
    unreadable, too large, or not YAML within the limits of this module.

    Dates and numbers of base 60, which YAML 1.1 has, are text: `3:27` is no number here.
    """
    text = read_text(file, MAX_YAML_BYTES)
    try:
        with _within_limits():
            return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file}: not YAML: {_yaml_reason(error)}") from error


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """Plain data, counted while it is read."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str | None, int] = {}
        """values behind each anchor, once all of them are read"""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """As the parent class, which is called for every value and every alias."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors:  # one without a size is still open: it holds itself
                self._count(self._sizes.get(event.anchor, MAX_NODES), event)
            return super().compose_node(parent, index)
        if event.tag is not None:
            raise _refusal("values are written without tags (!!) here", event)
        before, self._depth = self._nodes, self._depth + 1
        self._count(1, event)
        if self._depth > MAX_DEPTH:
            raise _refusal(f"it is nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def _count(self, values: int, event: yaml.Event) -> None:
        self._nodes += values
        if self._nodes > MAX_NODES:
            raise _refusal(f"more than {MAX_NODES} values, what aliases repeat counted", event)

    def construct_scalar(self, node: Any) -> Any:
        """The text of a value that is one."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and not _is_encodable(value):
            raise _refusal("a string in it holds half of a surrogate pair", node)
        return value

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As the parent class; a key stands there once."""
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in set(keys) if keys.count(key) > 1), None):
            raise _refusal(f"the key {twice!r} stands twice in one mapping", node)
        return node


def _refusal(what: str, at: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=at.start_mark)


def _number(loader: yaml.SafeLoader, node: Any) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    return _integer(digits, 10 if digits.strip("+-").isdecimal() else 16)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag.rpartition(":")[2] not in _OTHERWISE]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE, list("+-0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _DECIMAL, list("+-.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _number)


# ------------------------------------------------------------------------------------------- time


class _Expired(BaseException):
    """Raised in a program that takes too long; not an Exception, which the program may catch."""


def in_time(program: Callable[[], T], seconds: float, message: str) -> T:
    """What `program`, which came with an input, returns. Raises what it raises, and TimeoutError
    with `message` where it takes longer than so many `seconds` of its thread's processor time: a
    busy machine takes none of them away.

    It is interrupted in whatever thread it runs, between two instructions of the interpreter: one
    call of a function written in C is not.
    """
    try:
        with _watched(seconds):
            return program()
    except _Expired:
        raise TimeoutError(message) from None


@contextmanager
def _watched(seconds: float) -> Iterator[None]:
    """_Expired in the body, raised by another thread: signals would reach the main one only."""
    own, ended = threading.get_ident(), threading.Event()
    clock = time.pthread_getcpuclockid(own)
    limit = time.clock_gettime(clock) + seconds
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch() -> None:
        while (left := limit - time.clock_gettime(clock)) > 0:
            if ended.wait(max(left, LEAST_WAIT)):
                return
        raise_in(ctypes.c_ulong(own), ctypes.py_object(_Expired))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        raise_in(ctypes.c_ulong(own), None)  # takes back what came when the body had ended


# ------------------------------------------------------------------------------------------- text


def read_text(file: str | Path, limit: int = MAX_BYTES) -> str:
    """The text of `file`, in UTF-8. Raises InputError, naming it, where it is missing, not a
    regular file, unreadable, not text, or larger than `limit` bytes."""
    path = Path(file)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{file}: cannot be read: not a regular file")
        with path.open("rb") as content:
            data = content.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"{file}: cannot be read: larger than {limit >> 10} KiB")
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise InputError(f"{file}: cannot be read: too large for this machine's memory") from error
    except InputError:
        raise
    except ValueError as error:  # of UTF-8, or of a zero byte in the name of the file
        what = "it is not text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise InputError(f"{file}: cannot be read: {what}") from error


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
