"""Every reader of files from outside, fed by a fuzzer that looks for new paths through its code.

    python tools/fuzz_readers.py [--minutes M] [--only NAME,NAME] [--seed N]

Needs atheris (pip install atheris), which instruments the bytecode of fastprune and PyYAML. The
inputs are mutations of sound ones: of their bytes, and, where they are JSON, of their values. A
reader may return or raise an error of `fastprune.errors`, within a minute and 2 GiB. Any other
exception is printed with the input that led to it. Says how many inputs each reader was given;
exits 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE / "bad_inputs")]
SECONDS, MEGABYTES = 60, 2048
"""Limits of one input."""
MAX_BYTES = 1 << 16
"""Length of an input, without what a reader's `put` adds."""
COUNT = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
NUMBERS = ("-1", "0.5", "1e999", "18446744073709551616", "null", "true", "NaN", "[]", "{}")
"""What the fuzzer may put in, beside the words of the sound inputs."""


@dataclass(frozen=True)
class Reader:
    """One way in: `put` writes an input into a folder as a file, and `read` reads what is there."""

    sound: bytes
    read: Callable[[Path], Any]
    put: Callable[[Path, bytes], Any]
    json: bool = True
    """whether inputs are JSON"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader")
    parser.add_argument("--only", default="", help="names of readers, joined by commas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzz_readers needs atheris: pip install atheris", file=sys.stderr)
        return 2
    if args.child:
        fuzz(args.child[0], Path(args.child[1]), args.seed, args.minutes)
    with tempfile.TemporaryDirectory(prefix="fuzz-readers-") as folder:
        names = args.only.split(",") if args.only else list(_readers(Path(folder) / "base"))
        failed = [name for name in names if not _ran_well(name, Path(folder), args)]
    return bool(failed)


def _ran_well(name: str, folder: Path, args: argparse.Namespace) -> bool:
    """Run one reader in a process of its own; whether all inputs ended as they may."""
    own = folder / name
    own.mkdir()
    command = [sys.executable, __file__, "--child", name, str(own)]
    command += ["--seed", str(args.seed), "--minutes", str(args.minutes)]
    environment = os.environ | {
        "XDG_CACHE_HOME": str(own / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    ran = subprocess.run(command, capture_output=True, env=environment, cwd=own)
    output = (ran.stdout + ran.stderr).decode(errors="backslashreplace")
    count = COUNT.search(output)
    print(f"{name:12} {int(count[1]) if count else 0:9,} inputs", end="", flush=True)
    print("" if not ran.returncode else f", exit status {ran.returncode}", flush=True)
    if ran.returncode:
        print(ascii(output[-4000:])[1:-1].replace("\\n", "\n"))
        for file in (
            path for path in own.iterdir() if path.name.startswith(("crash-", "timeout-"))
        ):
            print(f"the input: {file.read_bytes()[:2000]!r}")
    return not ran.returncode


def fuzz(name: str, folder: Path, seed: int, minutes: float) -> None:
    """Feed the reader `name` in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["fastprune", "yaml"]):
        reader = _readers(folder / "base")[name]
    from fastprune.errors import FastpruneError

    corpus, place = folder / "corpus", folder / "place"
    corpus.mkdir()
    place.mkdir()
    (corpus / "sound").write_bytes(reader.sound)
    reader.put(place, reader.sound)
    reader.read(place)  # or nothing would be shown by what follows
    words = {word.decode() for word in re.findall(rb"[A-Za-z_][\w.]{2,30}", reader.sound)}
    entries = [json.dumps(word) for word in (*sorted(words), *NUMBERS)]
    (folder / "words").write_text("\n".join(entries))

    def run(data: bytes) -> None:
        reader.put(place, data)
        try:
            reader.read(place)
        except FastpruneError as error:
            if not str(error):
                raise ValueError("an error that says nothing") from error

    arguments = [
        sys.argv[0], f"-seed={seed}", f"-max_total_time={int(60 * minutes)}",
        f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={MAX_BYTES}",
        f"-dict={folder / 'words'}", f"-artifact_prefix={folder}/", "-print_final_stats=1",
        str(corpus),
    ]  # fmt: skip
    atheris.Setup(arguments, run, custom_mutator=_mutated if reader.json else None)
    atheris.Fuzz()


def _mutated(data: bytes, size: int, seed: int) -> bytes:
    """`data`, which is JSON or was, with a value of it changed, or its bytes."""
    import atheris
    from case import WRONG_VALUES, changed, places

    rng = random.Random(seed)
    try:
        content = json.loads(data)
        path = rng.choice(list(places(content)))
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return atheris.Mutate(data, size)
    if rng.random() < 0.3:
        return atheris.Mutate(data, size)
    new = rng.choice((..., *WRONG_VALUES, content))
    return json.dumps(changed(content, path, new)).encode("utf-8", "surrogatepass")[:size]


def _readers(folder: Path) -> dict[str, Reader]:
    """All readers by name; the sound inputs are made in `folder`."""
    from inputs import make_base

    base = make_base(folder).folder
    return {**_of_settings(base), **_of_models(base), **_of_data()}


def _file(name: str) -> Callable[[Path, bytes], Any]:
    """What puts an input into the file `name` of a folder."""
    return lambda place, data: (place / name).write_bytes(data)


def _of_settings(base: Path) -> dict[str, Reader]:
    """Readers of plans, scores, recipes and settings, and of what they are written in."""
    from fastprune.flags import parse
    from fastprune.pruning.config import PruneConfig
    from fastprune.pruning.plan import Plan
    from fastprune.pruning.sensitivity import load_layer_importance
    from fastprune.readers import read_json, read_yaml
    from fastprune.recover.config import FinetuneConfig
    from fastprune.recover.recipes import FOLDER, load_recipe

    def settings(place: Path) -> Any:
        given = ["model", "--out", "out", "--config", str(place / "a.yaml")]
        return parse(PruneConfig, given, "fastprune prune").check()

    plan = (base / "plan.json").read_bytes()
    recipe = (FOLDER / "staged.yaml").read_bytes()
    importance = b'{"layer_importance": {"0": 1.0, "1": 2.5}}'
    chosen = b"ratio: 0.3\nlayers: '0:1'\nalign: 8\ncalib-samples: 2\nstructures: [mlp]\n"
    json_file, yaml_file = _file("a.json"), _file("a.yaml")
    return {
        "json": Reader(plan, lambda place: read_json(place / "a.json"), json_file),
        "yaml": Reader(recipe, lambda p: read_yaml(p / "a.yaml"), yaml_file, json=False),
        "plan": Reader(plan, lambda place: Plan.load(place / "a.json"), json_file),
        "importance": Reader(
            importance, lambda place: load_layer_importance(place / "a.json", 2), json_file
        ),
        "settings": Reader(chosen, settings, yaml_file, json=False),
        "recipe": Reader(
            recipe,
            lambda place: load_recipe(FinetuneConfig(recipe=str(place / "a.yaml"))),
            yaml_file,
            json=False,
        ),
    }


def _of_models(base: Path) -> dict[str, Reader]:
    """Readers of the files of models and adapters."""
    from fastprune.models.adapter import check_adapter
    from fastprune.models.foreign import convert_gguf
    from fastprune.models.gguf_file import read_contents
    from fastprune.models.load import load_config
    from fastprune.models.shards import listed_files

    weights = (base / "model" / "model.safetensors").read_bytes()
    packed = (base / "tiny.gguf").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    end = read_contents(base / "tiny.gguf").data
    index = b'{"metadata": {"total_size": 8}, "weight_map": {"a": "b.safetensors"}}'

    def framed(place: Path, header: bytes) -> None:
        size = len(header).to_bytes(8, "little")
        (place / "model.safetensors").write_bytes(size + header + weights[length:])

    def adapter(place: Path) -> None:
        for name in ("adapter_model.safetensors", "fastprune_base.json"):
            (place / name).write_bytes((base / "adapter" / name).read_bytes())
        check_adapter(place)

    return {
        "safetensors": Reader(weights[8:length].rstrip(), _weights, framed),
        "index": Reader(index, lambda place: listed_files(place / "a.json"), _file("a.json")),
        "config": Reader(
            (base / "model" / "config.json").read_bytes(), load_config, _file("config.json")
        ),
        "adapter": Reader(
            (base / "adapter" / "adapter_config.json").read_bytes(),
            adapter,
            _file("adapter_config.json"),
        ),
        "gguf": Reader(
            packed[:end],
            lambda place: convert_gguf(place / "a.gguf"),
            lambda place, data: (place / "a.gguf").write_bytes(data + packed[end:]),
            json=False,
        ),
    }


def _weights(place: Path) -> None:
    """Read every weight of the folder `place` that says it holds floating-point numbers."""
    import torch

    from fastprune.models.shards import ShardReader

    reader = ShardReader(place)
    reader.check_floats()
    for name in reader.entries:
        reader.read(name, torch.float32, torch.device("cpu"))


def _of_data() -> dict[str, Reader]:
    """Readers of texts and training data, in the forms that are parsed here."""
    from fastprune.data.records import read_file

    record = {"messages": [{"role": "user", "content": "Who?"}], "text": "Nobody."}
    sound = {
        "json": json.dumps([record] * 2), "jsonl": f"{json.dumps(record)}\n" * 2,
        "csv": 'prompt,response\n"Who, and why?",Nobody.\n',
    }  # fmt: skip
    return {
        f"data.{form}": Reader(
            text.encode(),
            lambda place, form=form: list(read_file(place / f"a.{form}")),
            lambda place, data, form=form: (place / f"a.{form}").write_bytes(data),
            json=form == "json",
        )
        for form, text in sound.items()
    }


if __name__ == "__main__":
    sys.exit(main())
