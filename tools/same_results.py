"""Digests of what pruning decides and writes, to hold a changed program against an earlier one.

    python tools/same_results.py > before.txt       in the checkout as it was
    python tools/same_results.py > after.txt        in the changed one, on the same machine
    diff before.txt after.txt

Each line names a setting and gives digests of the plan and of the pruned weights. Tiny random
models of every family go through every score, allocation, layout and kind of structure, with and
without compensation, in memory and streamed. `--model NAME` adds a few runs on a real model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import FAMILIES, TEXT, tiny_checkpoint

import fastprune
from fastprune import cli

SCORES = (
    *("taylor-first", "taylor-second", "taylor-mix", "taylor-vector", "magnitude-l1"),
    *("magnitude-l2", "activation", "activation-maw", "obs", "random"),
)
RULES = {
    "uniform": {"allocation": "uniform"},
    "inverse": {"allocation": "inverse"},
    "proportional": {"allocation": "proportional", "layer_importance": "activation"},
    "global": {"allocation": "global"},
    "search": {"allocation": "search", "exchange_rounds": 2},
}
FAST: dict[str, Any] = {"structures": ("attention", "mlp"), "align": 1, "max_layer_ratio": 0.9}


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting by a name."""
    for compensate in ("none", "least-squares"):
        one = {**FAST, "compensate": compensate}
        for score in SCORES:
            yield f"{score} {compensate}", {**one, "importance": score, "allocation": "uniform"}
        for name, rule in RULES.items():
            yield f"{name} {compensate}", one | rule
        for rule in ("uniform", "search"):
            whole = {**one, "structures": ("attention", "mlp", "sublayer"), "allocation": rule}
            yield f"sublayers thinned {rule} {compensate}", whole
        whole = {**one, "structures": ("sublayer",), "allocation": "uniform"}
        yield f"sublayers {compensate}", whole
        yield f"layout uniform {compensate}", {**one, "layout": "uniform"}
        yield f"steps {compensate}", {**one, "iterations": 2}
    yield "aligned", {**FAST, "align": 8, "ratio": 0.3}
    yield "channels", {"structures": ("mlp",), "align": 8}
    yield "fast", {"effort": "fast"}
    yield "balanced", {"effort": "balanced"}


def digest(folder: Path) -> tuple[str, str]:
    """Digests of the plan and of the weights in `folder`."""
    [plan] = folder.rglob("plan.json")
    weights = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            weights.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    layers = json.loads(plan.read_text(encoding="utf-8"))["layers"]
    return _short(json.dumps(layers).encode()), weights.hexdigest()[:16]


def run(model: Path | str, text: str, chosen: dict[str, Any], *more: str) -> str:
    """One prune by the command line: digests of its result, or the status of a refusal."""
    small = {"ratio": 0.25, "calib": text, "eval": text} | chosen
    with tempfile.TemporaryDirectory() as folder:
        flags = []
        for name, value in small.items():
            values = ",".join(value) if isinstance(value, tuple) else value
            flags += [f"--{name.replace('_', '-')}", str(values)]
        out = Path(folder) / "out"
        command = ["prune", str(model), "--out", str(out), *flags, *more, "--device", "cpu"]
        status = cli.main([*command, "--keep-worse", "--quiet"])
        return " ".join(digest(out)) if status == 0 else f"status {status}"


def tiny(text: str, folder: Path) -> Iterator[str]:
    """Lines of the tiny models."""
    windows = ["--calib-samples", "16", "--calib-seq-len", "32", "--sensitivity-samples", "2"]
    windows += ["--eval-seq-len", "32", "--eval-windows", "2"]
    for family in FAMILIES:
        model = tiny_checkpoint(folder / family, family)
        for name, chosen in settings():
            for form in ([], ["--stream"]):
                if form and (chosen.get("allocation") == "search" or chosen.get("iterations")):
                    continue
                yield f"{family} {name}{' streamed' if form else ''}: " + run(
                    model, text, chosen, *windows, *form
                )


def real(model: str) -> Iterator[str]:
    """Lines of a real model, by the built-in texts."""
    few = ["--calib-samples", "16", "--eval-windows", "2", "--search-samples", "16"]
    for name, chosen in settings():
        if name in ("fast", "obs least-squares", "taylor-first none", "search least-squares"):
            mine = {k: v for k, v in chosen.items() if k != "align"} | {"eval": "builtin:wikitext2"}
            yield f"{model} {name}: " + run(model, "builtin:c4", mine, *few)


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    """Print all lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a real model, such as smollm2-135m")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        text = Path(folder, "text.txt")
        text.write_text(TEXT * 40, encoding="utf-8")
        print(f"fastprune {Path(fastprune.__file__).parent.name}, torch {torch.__version__}")
        for line in tiny(str(text), Path(folder)):
            print(line, flush=True)
        if asked.model:
            for line in real(asked.model):
                print(line, flush=True)


if __name__ == "__main__":
    main()
