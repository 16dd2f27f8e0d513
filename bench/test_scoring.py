"""Cost of scoring: Taylor importance against the bare forward and backward it rests on.

Both providers see the same 128 windows of 128 tokens of SmolLM2-135M in fp32, one window a pass.
The bytes are the weights, read forward and backward, and the gradients, written, for each window.
`peak_memory_bytes` in extra_info is the peak of a fresh process that loads the model and scores.
"""

import json
import subprocess
import sys

import pytest
import torch

from fastprune.data.builtin import TRAINING_TEXT
from fastprune.data.text import load_documents, sample_windows, token_stream
from fastprune.inspect.memory import peak_memory_bytes
from fastprune.models.layers import Layers
from fastprune.models.load import load_model
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.importance import score

SAMPLES, LENGTH = 128, 128


def load():
    model, tokenizer = load_model("smollm2-135m", dtype="float32")
    stream = token_stream(tokenizer, load_documents(TRAINING_TEXT))
    return model, sample_windows(stream, LENGTH, SAMPLES)


def bare(model, windows):
    for window in windows:
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def fastprune(model, windows):
    score(Calibration(Layers(model), windows), "taylor-first")


def peak_of_a_fresh_process() -> int:
    command = [sys.executable, __file__, str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("provider", [bare, fastprune], ids=lambda p: p.__name__)
def test_scoring(benchmark, provider):
    model, windows = load()
    benchmark.group = f"score {SAMPLES}x{LENGTH} tokens, {torch.get_num_threads()} threads"
    benchmark.extra_info["bytes"] = 3 * SAMPLES * sum(4 * p.numel() for p in model.parameters())
    if provider is fastprune:
        benchmark.extra_info["peak_memory_bytes"] = peak_of_a_fresh_process()
    benchmark.pedantic(provider, args=(model, windows), rounds=1, warmup_rounds=0)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    fastprune(*load())
    print(peak_memory_bytes(torch.device("cpu")))
