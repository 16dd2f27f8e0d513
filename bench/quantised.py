"""What pruning buys beside and on top of quantisation: bytes, perplexity, tokens a second.

    python bench/quantised.py smollm2-135m runs/demo --quants f16,q8_0,q5_0,q4_0

Every model is exported as GGUF in every type. The perplexity is that of the weights in the file
(WikiText-2 test, windows of 1,024 tokens, read by this package); the speed is llama.cpp's at batch
1, where xllamacpp or llama-cpp-python is installed, one model after the other, in turns. Prints one
markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import fastprune
from fastprune.data.builtin import WIKITEXT2
from fastprune.data.text import load_documents
from fastprune.exporting.config import ExportConfig
from fastprune.inspect.perplexity import evaluate, text_windows
from fastprune.models.gguf import read_header
from fastprune.models.gguf_weights import read_weights
from fastprune.models.load import load_model
from fastprune.precision import fast_forward

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import engine_llama_cpp

TURNS, TOKENS = 3, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--quants", default="f16,q8_0,q5_0,q4_0")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantised-") as name:
        found = {}
        for model in asked.models:
            folder = Path(name) / str(len(found))
            folder.mkdir()
            found |= measured(model, asked.quants.split(","), asked.windows, folder)
        rates = speeds([file for file, _ in found.values()], asked.threads)
        print("| model | weights | MiB | perplexity | tokens/s |\n|---|---|---:|---:|---:|")
        for (model, quant), (file, value) in found.items():
            rate = f"{rates[file]:.1f}" if rates else "—"
            print(
                f"| {model} | {quant} | {file.stat().st_size / 2**20:.0f} | {value:.2f} | {rate} |"
            )


def measured(
    source: str, quants: list[str], count: int, folder: Path
) -> dict[tuple[str, str], tuple[Path, float]]:
    """Of each type the file in `folder` and the perplexity of the weights in it."""
    model, tokenizer = load_model(source)
    windows = text_windows(tokenizer, load_documents(WIKITEXT2), 1024, count)
    found = {}
    for quant in quants:
        file = folder / f"{quant}.gguf"
        config = ExportConfig(model=source, format=("gguf",), out=file, quant=quant, pad=True)
        fastprune.export(model, tokenizer, config)
        read = read_weights(read_header(file))
        with fast_forward(read.device, read.dtype):
            found[source, quant] = file, evaluate(read, windows).perplexity
    return found


def speeds(files: list[Path], threads: int) -> dict[Path, float]:
    """Tokens a second that llama.cpp decodes, the median of TURNS; empty where it is not here."""
    if engine_llama_cpp.installed() is None:
        return {}
    rates: dict[Path, list[float]] = {file: [] for file in files}
    for _ in range(TURNS):
        for file in files:
            engine = engine_llama_cpp.load(file, threads=threads)
            rates[file].append(engine.speed(engine.tokens("The capital of France is"), TOKENS))
    return {file: statistics.median(found) for file, found in rates.items()}


if __name__ == "__main__":
    main()
