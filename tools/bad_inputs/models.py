"""Malformed models: configs, tokenizers, weights, their indices, adapters, GGUF files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

COMMANDS: dict[str, Callable[[Base, Path, Path], list[str]]] = {
    "eval": lambda base, model, _: base.evaluate(model),
    "prune": lambda base, model, place: base.prune(model, place),
    "stream": lambda base, model, place: base.prune(model, place, "--stream"),
    "dry run": lambda base, model, place: [
        *base.prune(model, place), "--dry-run", "--json", str(place / "r.json")
    ],
    "diagnose": lambda _, model, __: ["diagnose", str(model), "--threads", "1"],
    "generate": lambda base, model, _: base.generate(model),
    "export": lambda base, model, place: base.export(model, place, "gguf"),
    "finetune": lambda base, model, place: base.finetune(model, place),
}  # fmt: skip
"""What reads a model, by name."""


def cases(base: Base, rng: random.Random) -> Iterator[Case]:
    """All malformed models."""
    yield from _configs(base, rng)
    yield from _tokenizers(base, rng)
    yield from _safetensors(base, rng)
    yield from _indices(base, rng)
    yield from _adapters(base, rng)
    yield from _gguf(base, rng)


def _of_model(
    base: Base,
    rng: random.Random,
    name: str,
    break_it: Callable[[Path], Any],
    expected: tuple[int, ...] = EITHER,
    command: str = "",
) -> Case:
    """A case whose model is broken by `break_it`, read by one of COMMANDS."""
    command = command or rng.choice(list(COMMANDS))

    def build(place: Path) -> list[str]:
        model = base.model(place)
        break_it(model)
        return COMMANDS[command](base, model, place)

    return Case(f"{command}: {name}", build, expected)


def _configs(base: Base, rng: random.Random) -> Iterator[Case]:
    sound = json.loads((base.folder / "model/config.json").read_text())
    for what, data in broken_texts(json.dumps(sound)).items():
        for command in ("eval", "stream", rng.choice(list(COMMANDS))):
            yield _of_model(
                base, rng, f"config.json: {what}",
                lambda model, data=data: written(model / "config.json", data),
                EITHER if command == "diagnose" else (2,), command,
            )  # fmt: skip
    for path in places_of(sound):
        for value in rng.sample((..., *WRONG_VALUES), 6):
            content = changed(sound, path, value)
            yield _of_model(
                base, rng, f"config.json: {path} = {value!r:.40}",
                lambda model, content=content: written(model / "config.json", content),
            )  # fmt: skip
    for dtype in ("float64", "int8", "bool", "int64", "float8_e4m3fn", "complex64", "torch.nn", 3):
        for command in ("eval", "prune", "stream", "export"):
            content = sound | {"dtype": dtype}
            yield _of_model(
                base, rng, f"config.json: dtype {dtype}",
                lambda model, content=content: written(model / "config.json", content),
                (2,), command,
            )  # fmt: skip
    for name in ("stop_strings", "eos_token_id", "max_length", "num_beams", "temperature", "junk"):
        for value in (["x"], -1, 10**12, "x", [[1]], None, 1e300, {"a": [1]}):
            content = {"eos_token_id": 0, name: value}
            yield _of_model(
                base, rng, f"generation_config.json: {name} = {value!r:.40}",
                lambda model, content=content: written(model / "generation_config.json", content),
                command=rng.choice(["generate", "prune", "stream"]),
            )  # fmt: skip


def places_of(content: Any) -> list[tuple[Any, ...]]:
    """The places in `content` that a change may be made at."""
    return list(places(content))


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "syntax": "{% for m in messages %}",
    "divides by zero": "{{ 1 / 0 }}",
    "undefined": "{{ messages[0].nothing.more }}",
    "type": "{{ messages + 3 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "large": "{% set x = 'x' * 10 ** 10 %}{{ x }}",
    "surrogate": "{{ '\\ud800' }}",
    "empty": "{{ '' }}",
    "private": "{{ messages.__class__.__mro__ }}",
    "number": 3,
    "list": [1],
}


def _tokenizers(base: Base, rng: random.Random) -> Iterator[Case]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base.folder / "model" / name).read_text()
        sound = json.loads(text)
        for what, data in broken_texts(text).items():
            yield _of_model(
                base, rng, f"{name}: {what}",
                lambda model, name=name, data=data: written(model / name, data),
            )  # fmt: skip
        paths = [path for path in places_of(sound) if "vocab" not in path and "merges" not in path]
        for path in rng.sample(paths, min(24, len(paths))):
            for value in rng.sample((..., *WRONG_VALUES), 3):
                content = changed(sound, path, value)
                yield _of_model(
                    base, rng, f"{name}: {path} = {value!r:.40}",
                    lambda model, name=name, content=content: written(model / name, content),
                )  # fmt: skip
        for number in range(30):
            data = damaged(text.encode(), rng)
            yield _of_model(
                base, rng, f"{name}: damaged {number}",
                lambda model, name=name, data=data: written(model / name, data),
            )  # fmt: skip
    for what, template in TEMPLATES.items():
        for command in ("generate", "chat"):
            yield _with_template(base, what, template, command)
    settings = json.loads((base.folder / "model/tokenizer.json").read_text())
    settings["model"]["vocab"]["beyond"] = 10**6
    yield _of_model(
        base, rng, "tokenizer.json: a token id beyond the vocabulary",
        lambda model: written(model / "tokenizer.json", settings),
    )  # fmt: skip


def _with_template(base: Base, what: str, template: Any, command: str) -> Case:
    sound = json.loads((base.folder / "model/tokenizer_config.json").read_text())

    def build(place: Path) -> list[str]:
        model = base.model(place)
        written(model / "tokenizer_config.json", sound | {"chat_template": template})
        if command == "chat":
            return ["chat", str(model), "--max-new-tokens", "2", "--threads", "1"]
        return base.generate(model, "--chat")

    return Case(f"{command}: chat template {what}", build, EITHER, stdin="Hello\n/exit\n")


def _safetensors(base: Base, rng: random.Random) -> Iterator[Case]:
    data = (base.folder / "model/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def joined(content: bytes | Any, size: int | None = None) -> bytes:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return (len(text) if size is None else size).to_bytes(8, "little") + text + body

    files = {what: joined(text) for what, text in broken_texts(json.dumps(header)).items()}
    files |= {
        "length zero": joined(header, 0),
        "length beyond the file": joined(header, len(data) * 2),
        "length beyond the memory": joined(header, 2**63),
        "no length": b"\1\2",
        "no weights": joined(header)[: 8 + length],
        "half of the weights": data[: len(data) // 2],
        "more than the weights": data + b"\0" * 100,
    }
    for what, content in files.items():
        for command in ("eval", "stream", rng.choice(list(COMMANDS))):
            yield _of_model(
                base, rng, f"model.safetensors: {what}",
                lambda model, content=content: written(model / "model.safetensors", content),
                command=command,
            )  # fmt: skip
    names = [name for name in header if name != "__metadata__"]
    paths = [path for path in places_of(header) if path[0] != "__metadata__"]
    for path in rng.sample(paths, 60):
        for value in rng.sample((..., *WRONG_VALUES), 2):
            content = joined(changed(header, path, value))
            yield _of_model(
                base, rng, f"model.safetensors: {path} = {value!r:.40}",
                lambda model, content=content: written(model / "model.safetensors", content),
            )  # fmt: skip
    for dtype in ("BOOL", "I8", "I64", "F8_E4M3", "U8", "F64", "C64", "X", 3, None):
        for name in rng.sample(names, 2):
            content = joined(changed(header, (name, "dtype"), dtype))
            yield _of_model(
                base, rng, f"model.safetensors: {name} as {dtype}",
                lambda model, content=content: written(model / "model.safetensors", content),
            )  # fmt: skip
    for number in range(60):
        content = damaged(data[: 8 + length], rng) + body
        yield _of_model(
            base, rng, f"model.safetensors: header damaged {number}",
            lambda model, content=content: written(model / "model.safetensors", content),
        )  # fmt: skip
    for what, kinds in {"bool": "BOOL", "bytes": "I8"}.items():
        yield _of_model(
            base, rng, f"model.safetensors: every weight {what}",
            lambda model, kind=kinds: _all_of(model, kind), command="eval",
        )  # fmt: skip
    escaped = {f"{name}{ESCAPES}": entry for name, entry in header.items() if name in names}
    for command in ("eval", "stream", "diagnose", "export", "generate"):
        yield _of_model(
            base, rng, "model.safetensors: names with escapes",
            lambda model: written(model / "model.safetensors", joined(escaped)), command=command,
        )  # fmt: skip


def _all_of(model: Path, kind: str) -> None:
    """Store every weight of `model` as `kind`, BOOL or I8."""
    import torch
    from safetensors.torch import load_file, save_file

    dtype = torch.bool if kind == "BOOL" else torch.int8
    file = model / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file)


def _indices(base: Base, rng: random.Random) -> Iterator[Case]:
    names = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    texts: dict[str, bytes | Any] = dict(broken_texts(json.dumps(names)))
    for value in (*WRONG_VALUES, "../model.safetensors", "/etc/passwd", ".", "..", "x" * 5000):
        texts[f"shard {value!r:.40}"] = {"weight_map": {"model.norm.weight": value}}
        texts[f"map {value!r:.40}"] = {"weight_map": value}
    for what, content in texts.items():

        def break_it(model: Path, content: Any = content) -> None:
            (model / "model.safetensors").unlink()
            written(model / "model.safetensors.index.json", content)

        for command in ("eval", rng.choice(["stream", "diagnose", "export"])):
            yield _of_model(base, rng, f"index: {what}", break_it, (2,), command)


def _adapters(base: Base, rng: random.Random) -> Iterator[Case]:
    files = {
        name: (base.folder / "adapter" / name).read_bytes()
        for name in ("adapter_config.json", "fastprune_base.json", "adapter_model.safetensors")
    }
    for name, data in files.items():
        wrong: dict[str, Any] = {"missing": None, "folder": ...}
        if name.endswith(".json"):
            sound = json.loads(data)
            wrong |= broken_texts(data.decode())
            for path in places_of(sound):
                for value in rng.sample((..., *WRONG_VALUES), 2):
                    wrong[f"{path} = {value!r:.40}"] = changed(sound, path, value)
        for number in range(30):
            wrong[f"damaged {number}"] = damaged(data, rng)
        for what, content in wrong.items():
            yield _of_adapter(base, rng, name, what, content)


def _of_adapter(base: Base, rng: random.Random, name: str, what: str, content: Any) -> Case:
    command = rng.choice(["generate", "merge", "eval", "export"])

    def build(place: Path) -> list[str]:
        adapter = place / f"adapter{ESCAPES.replace('/', '')}"
        for own in (base.folder / "adapter").iterdir():
            written(adapter / own.name, own.read_bytes())
        (adapter / name).unlink()
        if content is ...:
            (adapter / name).mkdir()
        elif content is not None:
            written(adapter / name, content)
        own = ["--adapter", str(adapter)]
        if command == "merge":
            return ["merge", base.sound, *own, "--out", str(place / "out"), "--threads", "1"]
        if command == "export":
            return base.export(base.sound, place, "hf", *own)
        if command == "eval":
            return base.evaluate(base.sound, *own)
        return base.generate(base.sound, *own)

    return Case(f"{command}: adapter, {name}: {what}", build, EITHER)


def _gguf(base: Base, rng: random.Random) -> Iterator[Case]:
    data = (base.folder / "tiny.gguf").read_bytes()
    end = data.find(b"\0" * 32, len(data) // 8)  # about where the header ends
    wrong = {
        "empty": b"",
        "short": data[:20],
        "magic": b"GGUX" + data[4:],
        "version": data[:4] + b"\xff\xff\xff\x7f" + data[8:],
        "tensors": data[:8] + b"\xff" * 8 + data[16:],
        "settings": data[:16] + b"\xff" * 7 + b"\x7f" + data[24:],
        "cut": data[: len(data) // 2],
        "git lfs": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for number in range(90):
        wrong[f"damaged {number}"] = damaged(data[:end], rng) + data[end:]
    for what, content in wrong.items():

        def build(place: Path, content: bytes = content) -> list[str]:
            return base.generate(written(place / "model.gguf", content))

        yield Case(f"generate: gguf, {what}", build, EITHER)
