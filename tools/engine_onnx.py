"""Does onnxruntime-genai generate from a uniform result what transformers generates from it?

SmolLM2 pruned with `--layout uniform`, and per layer but written as `hf-uniform`, is converted by
the package's own builder (fp32, for the CPU); five prompts are continued greedily by both.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from fastprune.models.load import load_model

MISSING = "onnxruntime-genai is not installed: pip install onnxruntime-genai onnx-ir"
PRUNE = "--ratio 0.2 --effort fast --compensate none --calib-samples 4 --calib-seq-len 128"
PRUNE += " --eval-windows 2 --keep-worse --quiet"
RUNS = {"uniform": ["--layout", "uniform"], "hf-uniform": ["--format", "hf-uniform"]}
TOKENS = 24


def installed() -> bool:
    """Whether onnxruntime-genai is at hand."""
    return find_spec("onnxruntime_genai") is not None


def checks(work: Path, prompts: tuple[str, ...]) -> Iterator[tuple[str, bool, str]]:
    """Name, whether the continuation is the same, and the text; `work` holds what is made."""
    for name, flags in RUNS.items():
        pruned = work / name
        if not pruned.exists():
            command = [sys.executable, "-m", "fastprune", "prune", "smollm2-135m"]
            subprocess.run([*command, "--out", str(pruned), *PRUNE.split(), *flags], check=True)
        folder = pruned / "exported/hf-uniform" if name == "hf-uniform" else pruned
        converted = _converted(folder, work / f"{name}-onnx")
        model, tokenizer = load_model(folder, dtype="float32")
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            found = _greedy(converted, ids)
            same = found == _expected(model, ids)[: len(found)]
            yield name, same, f"{prompt}{tokenizer.decode(found)!r}"


def _converted(folder: Path, out: Path) -> Path:
    """The checkpoint in `folder` as the builder writes it into `out`."""
    if not (out / "genai_config.json").is_file():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
        options = ["-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
        subprocess.run([*builder, *options], check=True, capture_output=True)
    return out


def _greedy(folder: Path, ids: list[int]) -> list[int]:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    options = genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(ids) + TOKENS)
    generator = genai.Generator(model, options)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


def _expected(model: torch.nn.Module, ids: list[int]) -> list[int]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    return found[0, len(ids) :].tolist()
