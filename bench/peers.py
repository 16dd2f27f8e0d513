"""What optipfair leaves of a model at the same ratio, read in the same windows as ours.

    pip install optipfair==0.4.2
    python bench/peers.py smollm2-135m --calib wiki.jsonl --test wikitext2-test.txt

It thins MLPs by weights times activations (its `MAW` with a dataloader). Each ratio, of the
parameters in the blocks, is tried over all layers and over all but the first and last three. Prints
Markdown.
"""

from __future__ import annotations

import argparse

import optipfair
import torch
from quality import LONG, SHORT
from torch.utils.data import DataLoader

from fastprune.data.text import eval_windows, load_documents, sample_windows, token_stream
from fastprune.inspect.perplexity import evaluate
from fastprune.models.families import block_parameters, decoder_layers
from fastprune.models.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--calib-seq-len", type=int, default=256)
    parser.add_argument("--test", required=True, help="text of the figures")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_model(options.model)[1]
    stream = token_stream(tokenizer, load_documents(options.calib))
    calibration = sample_windows(stream, options.calib_seq_len, options.calib_samples)
    text = token_stream(tokenizer, load_documents(options.test))
    readings = [eval_windows(text, *reading) for reading in (LONG, SHORT)]
    print("| removed | layers | " + " | ".join(f"{s} × {n}" for s, n in (LONG, SHORT)) + " |")
    print("|---:|---|---:|---:|")
    for ratio in options.ratios:
        for ends in (0, 3):
            model, _ = load_model(options.model)
            removed = prune(model, ratio, ends, calibration)
            found = [evaluate(model, windows).perplexity for windows in readings]
            layers = f"{ends}:{len(decoder_layers(model)) - ends}"
            cells = [f"{100 * removed:.1f} %", layers, *(f"{p:.2f}" for p in found)]
            print("| " + " | ".join(cells) + " |", flush=True)


def prune(model: torch.nn.Module, ratio: float, ends: int, calibration: torch.Tensor) -> float:
    """Thin the MLPs of ``model`` but for ``ends`` layers at both ends; the ratio it came to."""
    whole = block_parameters(model)
    layers = list(range(len(decoder_layers(model))))
    layers = layers[ends : len(layers) - ends]
    thinned = sum(p.numel() for i in layers for p in decoder_layers(model)[i].mlp.parameters())
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration]
    optipfair.prune_model(
        model,
        neuron_selection_method="MAW",
        pruning_percentage=100 * ratio * whole / thinned,
        dataloader=DataLoader(samples, batch_size=8),
        layer_indices=layers,
        show_progress=False,
    )
    return 1 - block_parameters(model) / whole


if __name__ == "__main__":
    main()
