"""Malformed settings: plans, importance files, recipes, --config files, flags and paths."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from case import (
    EITHER,
    ESCAPES,
    WRONG_VALUES,
    Base,
    Case,
    broken_texts,
    changed,
    damaged,
    places,
    written,
)

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
"""Nine to the power of twelve values."""
NUMBERS = (
    *("nan", "inf", "-inf", "-1", "0", "1e999", "-0.0", "9" * 19, "9" * 40, "9" * 5000, "1e400"),
    *("0x10", "1,2", "", " ", "x", "\0", "\udc80", ESCAPES, "1" + "0" * 12, "2147483648", "½"),
)
"""What may be written in the place of a number."""
PATHS = {
    "missing": "missing",
    "nul": "a\0b",
    "long name": "x" * 300,
    "long path": "x/" * 3000,
    "not UTF-8": "\udcff",
    "escapes": ESCAPES,
    "empty": "",
    "blank": " ",
    "zero device": "/dev/zero",
    "null device": "/dev/null",
    "folder": "/proc/self/fdinfo",  # without files of any form
    "process": "/proc/self/mem",
    "comma": ",",
}
"""Names of files that are none."""
LINKS = {"dangling link": "nowhere", "loop of links": "link"}
"""Where symbolic links lead."""


def cases(base: Base, rng: random.Random) -> Iterator[Case]:
    """All malformed settings."""
    yield from _plans(base, rng)
    yield from _importance(base)
    yield from _recipes(base)
    yield from _configs(base, rng)
    yield from _flags(base, rng)
    yield from _paths(base)
    yield from _command_lines(base)


def _plans(base: Base, rng: random.Random) -> Iterator[Case]:
    text = (base.folder / "plan.json").read_text()
    sound = json.loads(text)
    wrong: dict[str, tuple[Any, tuple[int, ...]]] = {
        what: (data, (2,)) for what, data in broken_texts(text).items()
    }
    paths = [path for path in places(sound) if len(path) < 4] + [("layers", 0, "channels", 0)]
    for path in paths:
        for value in rng.sample((..., *WRONG_VALUES), 5):
            wrong[f"{path} = {value!r:.40}"] = (changed(sound, path, value), EITHER)
    for what, (content, expected) in wrong.items():
        for more in ((), ("--stream",)) if expected == (2,) else (rng.choice([(), ("--stream",)]),):

            def build(place: Path, content: Any = content, more: Any = more) -> list[str]:
                plan = written(place / "plan.json", content)
                return base.prune(base.sound, place, "--plan", str(plan), *more)

            yield Case(f"prune {' '.join(more)}: plan: {what}", build, expected)


def _importance(base: Base) -> Iterator[Case]:
    sound = {"0": 1.0, "1": 2.0}
    wrong: dict[str, Any] = dict(broken_texts(json.dumps(sound)))
    wrong |= {f"value {v!r:.40}": {"0": 1.0, "1": v} for v in WRONG_VALUES}
    wrong |= {f"list {v!r:.40}": [v, v] for v in WRONG_VALUES}
    wrong |= {"too few": {"0": 1.0}, "too many": [1.0] * 1000, "other names": {"a": 1, "b": 2}}
    for what, content in wrong.items():
        for rule in ("inverse", "proportional"):

            def build(place: Path, content: Any = content, rule: str = rule) -> list[str]:
                file = written(place / "importance.json", content)
                more = ["--allocation", rule, "--layer-importance", str(file)]
                return base.prune(base.sound, place, *more)

            yield Case(f"prune: layer importance, {rule}: {what}", build, EITHER)


def _recipes(base: Base) -> Iterator[Case]:
    from fastprune.recover.recipes import Stage

    wrong = {
        "empty": "", "list": "[]", "text": "x", "no stages": "about: x", "bomb": BOMB,
        "stages of text": "stages: x", "stage of text": "stages: [x]", "no stage": "stages: []",
        "date": "stages:\n- lr: 2020-01-01", "tag": "stages: !!python/object:os.system x",
        "deep": "stages: " + "[" * 3000, "deep flow": "stages: " + "{a: " * 900,
        "own alias": "stages: &a [*a]", "no alias": "stages: *a", "tab": "stages:\n\t- lr: 1",
        "twice": "stages:\n- lr: 1e-5\n  lr: 1e-6",
        "two spellings": "stages:\n- max-steps: 1\n  max_steps: 2",
        "long": "stages:\n" + "- lr: 1e-5\n" * 30_000, "huge": "about: " + "x" * 10**7,
        "nul": "about: \0", "surrogate": 'about: "\\ud800"\nstages: [{lr: 0}]',
        "escapes": f"stages:\n- {json.dumps(ESCAPES)}: 1", "merge": "<<: 3\nstages: []",
        "two documents": "stages: []\n---\nstages: []", "sexagesimal": "stages:\n- max-steps: 3:99",
        "complex key": "? [a]\n: b", "set": "stages: !!set {a}", "binary": "stages: !!binary =",
    }  # fmt: skip
    for what, text in wrong.items():
        yield _recipe(base, what, text, (2,))
    for field in fields(Stage):
        for value in (".nan", ".inf", "-.inf", "-1", "1e999", "9" * 5000, "[[1]]", "{a: 1}",
                      "2020-01-01", "1" * 25, "x"):  # fmt: skip
            text = f"stages:\n- {{max_steps: 1, {field.name}: {value}}}"
            if field.name == "max_steps":
                text = f"stages:\n- max_steps: {value}"
            free = field.name in ("name", "lora_target_modules") and value not in (
                "[[1]]",
                "{a: 1}",
                "9" * 5000,
            )
            yield _recipe(base, f"{field.name}: {value[:40]}", text, EITHER if free else (2,))


def _recipe(base: Base, what: str, text: str, expected: tuple[int, ...]) -> Case:
    def build(place: Path) -> list[str]:
        file = written(place / "recipe.yaml", text)
        return base.finetune(base.sound, place, "--recipe", str(file))

    return Case(f"finetune: recipe: {what}", build, expected)


def _configs(base: Base, rng: random.Random) -> Iterator[Case]:
    texts = {
        "bomb": BOMB, "own alias": "ratio: &a [*a]", "date": "ratio: 2020-01-01",
        "long number": f"seed: {'9' * 5000}", "twice": "ratio: 0.2\nratio: 0.3",
        "two spellings": "calib-samples: 2\ncalib_samples: 3", "deep": "a: " + "[" * 5000,
        "deep map": "a: " + "{a: " * 2000, "tag": "ratio: !!float x", "set": "ratio: !!set {a}",
        "nul": "ratio: \0", "nul escaped": 'model: "a\\0b"', "utf-16": "ratio: 0.2",
        "surrogate": 'calib: "\\ud800"', "unknown": f"{json.dumps(ESCAPES)}: 1",
        "number key": "3: 4", "null key": "~: 4", "list": "- a", "text": "x", "empty": "",
        "infinite": "ratio: .inf", "nan": "gate-ppl-ratio: .nan", "bool": "ratio: true",
        "list of lists": "calib: [[a]]", "long text": "model: " + "x" * 200_000,
        "huge": "#" + "x" * 10**6, "binary": "ratio: !!binary x", "omap": "ratio: !!omap [a: 1]",
        "value": "model: =", "merge": "<<: *a", "not safe": "ratio: !!python/tuple [1]",
        "directive": "%YAML 9.9\n---\nratio: 1", "control": "model: \x1b[2J",
    }  # fmt: skip
    for what, text in texts.items():

        def build(place: Path, text: str = text, what: str = what) -> list[str]:
            data = text.encode("utf-16" if what == "utf-16" else "utf-8")
            file = written(place / "run.yaml", data)
            given = base.prune(base.sound, place)
            at = given.index("--ratio")
            return [*given[:at], *given[at + 2 :], "--config", str(file)]

        yield Case(f"prune: --config: {what}", build, (2,))
    for what in ("missing.yaml", "/dev/zero", "/", "x" * 5000, "a\0b", "", "\udcff"):
        yield Case(
            f"prune: --config {what[:20]!r}",
            lambda place, what=what: [*base.prune(base.sound, place), "--config", what], (2,),
        )  # fmt: skip
    for number in range(60):
        data = damaged(b"ratio: 0.3\nseed: 1\nlayers: '0:1'\ncalib-samples: 2\n", rng)
        yield Case(
            f"prune: --config: damaged {number}",
            lambda place, data=data: [
                *base.prune(base.sound, place), "--config", str(written(place / "r.yaml", data))
            ], EITHER,
        )  # fmt: skip


def _flags(base: Base, rng: random.Random) -> Iterator[Case]:
    """Every numeric flag of every command with what is no number for it."""
    from fastprune.cli import COMMANDS, _load

    for command, row in COMMANDS.items():
        kind = _load(row.config)
        for name, hint in get_type_hints(kind).items():
            if not {int, float} & {hint, *get_args(hint)}:
                continue
            flag = f"--{name.replace('_', '-')}"
            for value in rng.sample(NUMBERS, 7):
                wrong = value in ("nan", "inf", "-inf", "1e999", "x", "\0", "\udc80", "½", " ", "")
                wrong |= (len(value) > 18 and value.isdecimal()) or value in (ESCAPES, "1e400")
                expected = (2,) if wrong else EITHER
                if value in (" ", "") and "tuple" in str(hint):
                    expected = EITHER
                yield Case(
                    f"{command} {flag} {value[:30]!r}",
                    lambda place, c=command, f=flag, v=value: _command(base, place, c, f"{f}={v}"),
                    expected,
                )


def _command(base: Base, place: Path, command: str, *more: str) -> list[str]:
    """A command line that would do, and `more`."""
    one = ["--threads", "1"] if not any(word.startswith("--threads") for word in more) else []
    dry = ["--dry-run", "--json", str(place / "r.json")]
    given: list[str] = {
        "prune": lambda: [*base.prune(base.sound, place), *dry],
        "eval": lambda: base.evaluate(base.sound),
        "finetune": lambda: base.finetune(base.sound, place),
        "generate": lambda: base.generate(base.sound),
        "chat": lambda: ["chat", base.sound, *one],
        "diagnose": lambda: ["diagnose", base.sound, "--no-forward", *one],
        "merge": lambda: ["merge", base.sound, "--adapter", str(base.folder / "adapter"),
                          "--out", str(place / "out"), *one],
        "export": lambda: base.export(base.sound, place, "hf"),
        "compare": lambda: ["compare", str(place), "--out", str(place / "c.html"), *one],
        "compress": lambda: ["compress", str(place / "none"), "--out", str(place / "out"),
                             "--ratio", "0.2", *one],
        "info": lambda: ["info", *one],
        "completion": lambda: ["completion", "bash", *one],
    }[command]()  # fmt: skip
    return [*given, *more]


TAKING_PATHS = (
    ("prune", "MODEL"), ("prune", "--calib"), ("prune", "--eval"), ("prune", "--plan"),
    ("prune", "--tokenizer"), ("prune", "--layer-importance"), ("prune", "--out"),
    ("prune", "--json"), ("eval", "MODEL"), ("eval", "--text"), ("eval", "--adapter"),
    ("eval", "--tasks"), ("eval", "--tasks-data"), ("finetune", "MODEL"), ("finetune", "--data"),
    ("finetune", "--val-data"), ("finetune", "--test-data"), ("finetune", "--recipe"),
    ("finetune", "--teacher"), ("finetune", "--resume"), ("finetune", "--out"),
    ("generate", "MODEL"), ("generate", "--adapter"), ("diagnose", "MODEL"),
    ("diagnose", "--text"), ("diagnose", "--dense"), ("merge", "MODEL"), ("merge", "--adapter"),
    ("merge", "--out"), ("export", "MODEL"), ("export", "--out"), ("compare", "MODEL"),
    ("compare", "--out"), ("compress", "MODEL"), ("compress", "--data"), ("compress", "--out"),
)  # fmt: skip


def _paths(base: Base) -> Iterator[Case]:
    for command, flag in TAKING_PATHS:
        for what in (*PATHS, *LINKS):
            written_to = flag in ("--out", "--json")
            usable = written_to and what in ("missing", "escapes", "blank", "comma", "null device")
            # Devices are written into, and links are followed.
            usable |= flag == "--json" and what in ("zero device", "dangling link")
            unused = flag == "--layer-importance" or (flag == "--text" and what == "empty")
            unused |= flag == "--tasks" and what in ("comma", "empty", "blank")  # none are named
            yield Case(
                f"{command} {flag}: {what}",
                lambda place, given=(command, flag, what): _with_path(base, place, *given),
                EITHER if usable or unused else (2,),
            )


def _with_path(base: Base, place: Path, command: str, flag: str, what: str) -> list[str]:
    """A command line whose `flag`, or MODEL, is the path that is wrong in the way `what`."""
    if what in LINKS:
        os.symlink(LINKS[what], place / "link")
    path = str(place / "link") if what in LINKS else PATHS[what]
    if flag in ("--out", "--json") and what in ("escapes", "blank", "comma", "long name"):
        path = f"{place}/{path.replace('/', '')}"
    given = _command(base, place, command)
    if flag == "MODEL":
        return [given[0], path, *given[2:]]
    more = ["--tasks", "arc_easy"] if flag == "--tasks-data" else []
    return [*given, f"{flag}={path}", *more]


def _command_lines(base: Base) -> Iterator[Case]:
    lines: dict[str, list[str]] = {
        "unknown": ["prnue"], "escapes": [ESCAPES], "surrogate": ["\udc80"], "flag": ["--x"],
        "no command": [""], "option": ["prune", f"--{ESCAPES}"],
        "long option": ["info", "--" + "x" * 10**5],
        "layers beyond": [*base.prune(base.sound, Path()), "--layers", "29:3"],
        "layers wrong": [*base.prune(base.sound, Path()), "--layers", "9" * 5000 + ":1"],
        "layers text": [*base.prune(base.sound, Path()), "--layers", "a:b"],
        "limits": [*base.prune(base.sound, Path(), "--ratio", "0.5"),
                   "--max-layer-ratio", "0.2"],
        "limits crossed": [*base.prune(base.sound, Path()), "--min-layer-ratio", "0.9",
                           "--max-layer-ratio", "0.1"],
        "align": [*base.prune(base.sound, Path()), "--align", "1000"],
        "bytes": ["prune", base.sound, "--out", "o", "--target-bytes", "9" * 400 + "TB"],
        "bytes text": ["prune", base.sound, "--out", "o", "--target-bytes", "1e5"],
        "device": ["eval", base.sound, "--device", "cuda:" + "9" * 30],
        "device text": ["eval", base.sound, "--device", ESCAPES],
        "device empty": ["eval", base.sound, "--device", ""],
        "format": [*base.prune(base.sound, Path()), "--format", "x"],
        "quant": ["export", base.sound, "--format", "gguf", "--quant", ESCAPES, "--out", "o"],
        "columns": [*base.finetune(base.sound, Path()), "--columns", "a=b,a=c"],
        "columns text": [*base.finetune(base.sound, Path()), "--columns", ESCAPES],
        "freeze": [*base.finetune(base.sound, Path()), "--freeze", "last:" + "9" * 5000],
        "targets": [*base.finetune(base.sound, Path(), "--method", "lora"),
                    "--lora-target-modules", "x,y"],
        "rank": [*base.finetune(base.sound, Path(), "--method", "lora"), "--lora-r",
                 "999999999"],
        "prompt": base.generate(base.sound, "--prompt", "\udc80"),
        "prompt nul": base.generate(base.sound, "--prompt", "a\0b"),
        "system": ["chat", base.sound, "--system", "\ud800"],
        "tasks": base.evaluate(base.sound, "--tasks", ESCAPES),
        "hub data": [*base.finetune(base.sound, Path(), "--data", "hf:" + ESCAPES)],
        "hub nothing": [*base.finetune(base.sound, Path(), "--data", "hf:")],
        "hub model": ["eval", "a/b/c"], "hub model text": ["eval", ESCAPES],
        "empty list": ["compare", "--out", "c.html"],
    }  # fmt: skip
    for what, line in lines.items():
        expected = EITHER if what == "prompt nul" else (2,)
        yield Case(f"command line: {what}", lambda _, line=line: line, expected)
    for what, line in {"half": "\udc80", "nul": "a\0b", "long": "x " * 3000}.items():
        yield Case(
            f"chat: a line with {what}",
            lambda _: ["chat", base.sound, "--max-new-tokens", "2", "--threads", "1"],
            EITHER, stdin=f"{line}\n/exit\n",
        )  # fmt: skip
