"""Cost of scoring: Taylor importance against the bare forward and backward it rests on.

    pytest bench/test_scoring.py --benchmark-only

Both providers see the same 128 windows of 128 tokens of SmolLM2-135M, one window a pass. Memory is
the peak of a fresh process that loads the model and scores, in ``extra_info``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fastprune.data.text import BUILTIN, load_documents, sample_windows, token_stream
from fastprune.models.load import load_model
from fastprune.prune.importance import score

SAMPLES, LENGTH = 128, 128
GROUP = f"score smollm2-135m {SAMPLES}x{LENGTH} tokens fp32"


@pytest.fixture(scope="module")
def model_and_windows():
    model, tokenizer = load_model("smollm2-135m", dtype="float32")
    stream = token_stream(tokenizer, load_documents(BUILTIN))
    return model, sample_windows(stream, LENGTH, SAMPLES)


@pytest.mark.benchmark(group=GROUP)
def test_bare_forward_backward(benchmark, model_and_windows):
    model, windows = model_and_windows

    def run() -> None:
        for window in windows:
            model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

    benchmark.pedantic(run, rounds=3, warmup_rounds=0)


@pytest.mark.benchmark(group=GROUP)
def test_fastprune_taylor_first(benchmark, model_and_windows):
    model, windows = model_and_windows
    benchmark.extra_info["peak_memory_bytes"] = peak_of_a_fresh_process()
    benchmark.pedantic(score, args=(model, windows, "taylor-first"), rounds=3, warmup_rounds=0)


def peak_of_a_fresh_process() -> int:
    """Peak resident bytes of a process that does nothing but load, tokenise, and score."""
    command = [sys.executable, __file__, str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    import resource

    torch.set_num_threads(int(sys.argv[1]))
    loaded, tokens = load_model("smollm2-135m", dtype="float32")
    text = token_stream(tokens, load_documents(BUILTIN), limit=SAMPLES * LENGTH)
    score(loaded, sample_windows(text, LENGTH, SAMPLES), "taylor-first")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
