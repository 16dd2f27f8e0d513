"""What a malformed input is to the rest of this tool, and how malformed values are made."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSED = (2,)
"""Exit status of an input that must not pass."""
EITHER = (0, 2, 3, 4)
"""Of one that is damaged at random, which may have hit what does not matter."""


@dataclass(frozen=True)
class Case:
    """One malformed input: `build` fills an empty folder and returns the command line."""

    name: str
    build: Callable[[Path], list[str]]
    expected: tuple[int, ...] = REFUSED
    stdin: str = ""


@dataclass(frozen=True)
class Base:
    """Sound inputs, of which malformed ones are made."""

    folder: Path

    def model(self, place: Path) -> Path:
        """A copy of the tiny model, as the folder `place`/model."""
        return Path(shutil.copytree(self.folder / "model", place / "model"))

    @property
    def sound(self) -> str:
        """The name of the tiny model itself, for cases that leave it alone."""
        return str(self.folder / "model")

    @property
    def text(self) -> str:
        """The name of a text that is long enough."""
        return str(self.folder / "text.txt")

    def prune(self, model: Path | str, place: Path, *more: str) -> list[str]:
        """A quick command line that prunes `model` into `place`/out."""
        quick = ["--calib-samples", "2", "--calib-seq-len", "16", "--eval-seq-len", "16"]
        quick += ["--eval-windows", "2", "--effort", "fast", "--threads", "1"]
        budget = () if {"--plan", "--ratio"} & set(more) else ("--ratio", "0.2")
        texts = [] if "--calib" in more else ["--calib", self.text]
        texts += [] if "--eval" in more else ["--eval", self.text]
        return ["prune", str(model), "--out", str(place / "out"), *budget, *quick, *texts, *more]

    def evaluate(self, model: Path | str, *more: str) -> list[str]:
        """A quick command line that evaluates `model`."""
        text = () if "--text" in more else ("--text", self.text)
        quick = ["--seq-len", "16", "--windows", "2", "--threads", "1"]
        return ["eval", str(model), *text, *quick, *more]

    def finetune(self, model: Path | str, place: Path, *more: str) -> list[str]:
        """A quick command line that finetunes `model` into `place`/out."""
        data = () if "--data" in more else ("--data", self.text)
        limit = () if {"--max-steps", "--recipe"} & set(more) else ("--max-steps", "1")
        quick = ["--seq-len", "16", "--batch-size", "1", "--grad-accum", "1", "--threads", "1"]
        quick += ["--eval-windows", "0", "--keep-worse"]
        return ["finetune", str(model), "--out", str(place / "out"), *data, *limit, *quick, *more]

    def generate(self, model: Path | str, *more: str) -> list[str]:
        """A quick command line that continues a prompt."""
        prompt = () if "--prompt" in more else ("--prompt", "The river")
        return ["generate", str(model), *prompt, "--max-new-tokens", "2", "--threads", "1", *more]

    def export(self, model: Path | str, place: Path, form: str, *more: str) -> list[str]:
        """A command line that writes `model` into `place`/out in the form `form`."""
        target = ["--format", form, "--out", str(place / "out"), "--threads", "1"]
        return ["export", str(model), *target, *more]

    def sound_lines(self) -> dict[str, Callable[[Path], list[str]]]:
        """Command lines without a fault, by name, for a folder to write into."""
        model, adapter = self.sound, ("--adapter", str(self.folder / "adapter"))
        return {
            "prune": lambda place: self.prune(model, place),
            "prune by a plan": lambda place: self.prune(
                model, place, "--plan", str(self.folder / "plan.json")
            ),
            "prune, streamed": lambda place: self.prune(model, place, "--stream"),
            "eval": lambda _: self.evaluate(model),
            "diagnose": lambda _: ["diagnose", model, "--threads", "1"],
            "finetune": lambda place: self.finetune(model, place),
            "generate": lambda _: self.generate(model),
            "generate from a .gguf file": lambda _: self.generate(self.folder / "tiny.gguf"),
            "merge": lambda place: [
                "merge", model, *adapter, "--out", str(place / "out"), "--threads", "1"
            ],
            "export as hf": lambda place: self.export(model, place, "hf"),
            "export as gguf": lambda place: self.export(model, place, "gguf"),
        }  # fmt: skip


ESCAPES = "\x1b[2J\x1b]0;title\x07[/x][bold]\x9b31m\u202e"
"""A name that a terminal would obey and that rich would read as markup."""

WRONG_VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", ESCAPES, [], {}, [[]], -1, 0, 2**31, 2**63, 2**64, 10**30),
    *(-(2**63), 0.5, 1e308, float("nan"), float("inf"), "9" * 30, "\0", ["a"], {"a": 1}),
)
"""Values that stand in the place of another."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in parsed JSON, the whole left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inner:
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of `value` with `new` at `path`; the value there is left out where `new` is ...."""
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return result


def broken_texts(sound: str) -> dict[str, bytes]:
    """Texts that are no JSON, or more of it than one should read, by what is wrong with them."""
    data = sound.encode()
    return {
        "empty": b"",
        "blank": b" \n",
        "cut": data[: len(data) // 2],
        "zeros": b"\0" * 64,
        "utf-16": sound.encode("utf-16"),
        "latin-1": b'{"a": "\xe9"}',
        "null": b"null",
        "number": b"3",
        "list": b"[]",
        "string": b'"x"',
        "object": b"{}",
        "deep list": b"[" * 100_000,
        "deep closed list": b"[" * 5000 + b"]" * 5000,
        "deep object": b'{"a":' * 50_000,
        "deep value": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        "long number": b'{"a": ' + b"9" * 5000 + b"}",
        "long fraction": b'{"a": 0.' + b"9" * 5000 + b"}",
        "huge exponent": b'{"a": 1e999999999}',
        "half pair": b'{"a": "\\ud800"}',
        "duplicate key": data.rstrip()[:-1] + b', "a": 1, "a": 2}',
        "comment": b"// no\n" + data,
        "trailing": data + b"}",
        "two": data + data,
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes changed, cut, doubled or put in."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(result)))
        kind = rng.randrange(5)
        if kind == 0:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del result[at : at + rng.randint(1, 64)]
        elif kind == 2:
            result[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 3:
            result[at:at] = result[at : at + rng.randint(1, 64)]
        else:
            del result[at:]
    return bytes(result)


def written(path: Path, content: bytes | str | Any) -> Path:
    """`path` with `content` in it: bytes and texts as they are, all else as JSON."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    data = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
