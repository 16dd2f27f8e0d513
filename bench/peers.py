"""What other tools leave of a model at the same ratio, read in the same windows as ours.

    pip install optipfair==0.4.2 torch-pruning==1.6.1
    python bench/peers.py smollm2-135m --calib wiki.jsonl --test wikitext2-test.txt

Both thin MLPs: optipfair by weights times activations (its `MAW` with a dataloader), Torch-Pruning
by the first-order Taylor term of a group's weights. Each ratio, of the parameters in the blocks, is
tried over all layers and over all but the first and last three. Prints Markdown.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from quality import LONG, SHORT
from torch import Tensor, nn
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
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_model(options.model)[1]
    stream = token_stream(tokenizer, load_documents(options.calib))
    calibration = sample_windows(stream, options.calib_seq_len, options.calib_samples)
    text = token_stream(tokenizer, load_documents(options.test))
    readings = [eval_windows(text, *reading) for reading in (LONG, SHORT)]
    columns = " | ".join(f"{tokens} × {windows}" for tokens, windows in (LONG, SHORT))
    print(f"| tool | removed | layers | {columns} |\n|---|---:|---|---:|---:|")
    for tool, ratio, ends in product(options.tools, options.ratios, (0, 3)):
        model, _ = load_model(options.model)
        removed = prune(tool, model, ratio, ends, calibration)
        found = [evaluate(model, windows).perplexity for windows in readings]
        layers = f"{ends}:{len(decoder_layers(model)) - ends}"
        cells = [tool, f"{100 * removed:.1f} %", layers, *(f"{p:.2f}" for p in found)]
        print("| " + " | ".join(cells) + " |", flush=True)


def prune(tool: str, model: nn.Module, ratio: float, ends: int, calibration: Tensor) -> float:
    """Thin the MLPs of ``model`` but for ``ends`` layers at both ends; the ratio it came to."""
    whole = block_parameters(model)
    layers = list(range(len(decoder_layers(model))))
    layers = layers[ends : len(layers) - ends]
    thinned = sum(p.numel() for i in layers for p in decoder_layers(model)[i].mlp.parameters())
    TOOLS[tool](model, layers, ratio * whole / thinned, calibration)
    return 1 - block_parameters(model) / whole


def with_optipfair(model: nn.Module, layers: list[int], share: float, windows: Tensor) -> None:
    """Take ``share`` of the channels of each of ``layers``, by maximum absolute weights."""
    import optipfair

    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    optipfair.prune_model(
        model,
        neuron_selection_method="MAW",
        pruning_percentage=100 * share,
        dataloader=DataLoader(samples, batch_size=8),
        layer_indices=layers,
        show_progress=False,
    )


def with_torch_pruning(model: nn.Module, layers: list[int], share: float, windows: Tensor) -> None:
    """Take ``share`` of the channels of each of ``layers``, by its group Taylor importance."""
    import torch_pruning

    for ids in windows.split(8):
        (model(input_ids=ids, labels=ids, use_cache=False).loss * len(ids)).backward()
    cut = torch_pruning.prune_linear_out_channels
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(model, {"input_ids": windows[:1], "use_cache": False})
    importance = torch_pruning.importance.GroupTaylorImportance()
    for index in layers:
        gate = decoder_layers(model)[index].mlp.gate_proj
        group = graph.get_pruning_group(gate, cut, list(range(gate.out_features)))
        weakest = importance(group).argsort()[: round(share * gate.out_features)]
        graph.get_pruning_group(gate, cut, weakest.tolist()).prune()


TOOLS = {"optipfair": with_optipfair, "torch-pruning": with_torch_pruning}


if __name__ == "__main__":
    main()
