"""What pruning buys in speed: prompt and decoding tokens a second of dense and pruned shapes.

    python bench/speed.py                       # SmolLM2-135M's shape on the CPU, fp32 and bf16
    python bench/speed.py --shape llama-8b --device cuda --dtypes bfloat16

A model of the shape, every weight the same number, against the same model with 20, 30 and 50 % of
its block parameters removed: per layer (channels, another number in every layer), uniform (the same
number in each) and sublayers (attention and MLP of layers in the middle), at widths in multiples of
32 and at odd ones. Each pruned model takes turns with the dense one, as `fastprune eval --speed`
measures. Prints one markdown table of median tokens a second, and how many times as fast as dense;
everything measured goes to ``--json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig

from fastprune.config import resolve_device, resolve_dtype
from fastprune.inspect.speed import FULL, Selection, Speed, measure_speeds
from fastprune.models.families import Geometry, block_parameters, decoder_layers, geometries
from fastprune.models.modeling import per_layer_config
from fastprune.models.quiet import quiet_libraries
from fastprune.models.skeleton import skeleton
from fastprune.pruning.latency import with_equal_weights
from fastprune.report import format
from fastprune.report.run import versions, write_json

RESULT = Path(__file__).parent / "results" / "speed.json"
SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
ABOUT = ("dtype", "form", "widths", "removed")
ALIGN = 32
SPREAD = 0.5
"""Of the distance of the mean width to none or to all, whichever is nearer: so far widths differ
from the mean where they differ by layer."""


@dataclass(frozen=True)
class Variant:
    """A form of the pruned model, how its widths are chosen, and the sizes of its layers."""

    form: str
    widths: str
    sizes: list[Geometry]


def main() -> None:
    options = parsed()
    selection = Selection(tuple(options.prompts), tuple(options.batches), options.turns)
    device = resolve_device(options.device)
    settings = SHAPES[options.shape]
    if options.layers:
        settings = settings | {"num_hidden_layers": options.layers}
    print(f"{options.shape}, {device}, {torch.get_num_threads()} threads\n")
    print(*header(selection), sep="\n", flush=True)
    found = []
    for dtype in options.dtypes:
        dense = skeleton(LlamaConfig(**settings), resolve_dtype(dtype))
        share, full = channel_share(dense), geometries(dense)
        dense = with_equal_weights(dense, device)
        tried = [v for ratio in options.ratios for v in variants(full, ratio, share)]
        for number, variant in enumerate(tried):
            config = per_layer_config(dense.config, variant.sizes)
            small = with_equal_weights(skeleton(config, dense.dtype), device)
            with quiet_libraries():
                speeds = measure_speeds({"dense": dense, "small": small}, selection)
            removed = 1 - block_parameters(small) / block_parameters(dense)
            if not number:
                print(row([dtype, "dense", "", 0.0], speeds["dense"], speeds["dense"]), flush=True)
            about = [dtype, variant.form, variant.widths, removed]
            print(row(about, speeds["small"], speeds["dense"]), flush=True)
            measured = {name: speed.to_dict() for name, speed in speeds.items()}
            found.append(dict(zip(ABOUT, about)) | {"speed": measured})
    about = {"shape": options.shape, "device": str(device), "threads": torch.get_num_threads()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.json, {**about, "versions": versions(), "measured": found})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="as many layers instead of the shape's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--prompts", type=int, nargs="+", default=FULL.prompts)
    parser.add_argument("--batches", type=int, nargs="+", default=FULL.batches)
    parser.add_argument("--turns", type=int, default=FULL.turns)
    parser.add_argument("--json", type=Path, default=RESULT)
    return parser.parse_args()


def variants(full: list[Geometry], ratio: float, share: float) -> Iterator[Variant]:
    """The forms of a model with layers ``full``, ``ratio`` of their parameters removed.

    ``share`` of a layer's parameters are its channels'; where those are too few, sublayers alone.
    """
    kept = 1 - ratio / share  # of the channels
    if kept > 0:
        offsets = np.linspace(-SPREAD, SPREAD, len(full)) * min(kept, 1 - kept)
        offsets = np.random.default_rng(0).permutation(offsets)
        for form, means in (("per-layer", kept + offsets), ("uniform", np.full(len(full), kept))):
            for widths, multiple in ((f"multiples of {ALIGN}", ALIGN), ("odd", 1)):
                channels = [
                    width(size.channels * mean, multiple) for size, mean in zip(full, means)
                ]
                sizes = [replace(size, channels=c) for size, c in zip(full, channels)]
                yield Variant(form, widths, sizes)
    gone = round(ratio * len(full))
    first = (len(full) - gone) // 2
    nothing = replace(full[0], kv_heads=0, query_heads=0, channels=0)
    yield Variant("sublayers", "", [*full[:first], *[nothing] * gone, *full[first + gone :]])


def channel_share(model: nn.Module) -> float:
    """The share of a decoder layer's parameters that its channels hold."""
    layer = decoder_layers(model)[0]
    mlp, whole = (sum(p.numel() for p in part.parameters()) for part in (layer.mlp, layer))
    return mlp / whole


def width(channels: float, multiple: int) -> int:
    """The multiple that is nearest to ``channels``; an odd number for 1."""
    if multiple == 1:
        return round(channels) // 2 * 2 + 1
    return max(1, round(channels / multiple)) * multiple


def header(selection: Selection) -> list[str]:
    columns = [*ABOUT, *(f"prompt {n}" for n in selection.prompts)]
    columns += [f"decode × {n}" for n in selection.batches]
    columns += ["peak memory"]
    return [line(columns), line(["---"] * len(columns))]


def row(about: list[Any], speed: Speed, dense: Speed) -> str:
    """One line of the table: ABOUT, the rates of ``speed``, how many times those of ``dense``."""
    *cells, removed = about
    cells.append(format.percent(removed))
    for mine, other in zip([*speed.prompt, *speed.decoding], [*dense.prompt, *dense.decoding]):
        rate, known = mine.tokens_per_second.median, other.tokens_per_second.median
        cells.append(f"{rate:,.4g}" + ("" if speed is dense else f" ({rate / known:.2f} ×)"))
    return line([*cells, format.size(speed.peak_memory_bytes)])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
