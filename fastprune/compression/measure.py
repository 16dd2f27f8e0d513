"""The figures of one model: parameters, bytes, perplexities, tasks, memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from fastprune.compression.config import CompressConfig
from fastprune.compression.schedule import UNIT_TOKENS
from fastprune.data.text import characters_for, load_documents
from fastprune.inspect.generate import generate
from fastprune.inspect.memory import forget_peak, peak_memory_bytes
from fastprune.inspect.perplexity import (
    SEQ_LEN,
    evaluate,
    sound,
    text_windows,
    window_length,
    with_bytes,
)
from fastprune.inspect.speed import SHORT, measure_speeds
from fastprune.inspect.tasks import evaluate_tasks
from fastprune.messages import Message
from fastprune.models.families import block_parameters
from fastprune.models.vocabulary import check_largest
from fastprune.precision import fast_forward
from fastprune.progress import stage

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "To make bread, you need flour, water,",
    "The three primary colours are",
    "Once upon a time, in a village by the sea,",
)
"""Answered by the dense, the pruned and the recovered model side by side."""
SAMPLE_TOKENS = 24
GLIMPSE = 256
"""Tokens from which the pace is guessed before anything is measured."""


def figures(model: nn.Module, tokenizer: Any, config: CompressConfig) -> dict[str, Any]:
    """Parameters, perplexity on each text, tasks and peak memory of `model`, JSON-ready.

    Perplexity comes of bf16 products where the device has units for them: in half the time, and
    within 0.1 % of fp32.
    """
    device = next(model.parameters()).device
    forget_peak(device)
    texts = []
    for name, count in config.texts():
        seq_len = window_length(model, "--eval-seq-len", config.eval_seq_len, SEQ_LEN)
        documents = load_documents(name, characters_for(seq_len * count))
        windows = text_windows(tokenizer, documents, seq_len, count)
        check_largest(model, tokenizer, int(windows.max()), name)
        with fast_forward(device, model.dtype):
            found = evaluate(model, windows)
        found = sound(found, model, Message("the loss of the model"))
        found = with_bytes(found, tokenizer, windows)
        texts.append({"text": name, **found.to_dict()})
    peak = peak_memory_bytes(device)
    tasks = {}
    if config.tasks:
        tasks = evaluate_tasks(model, tokenizer, config, seed=config.seed)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "block": block_parameters(model),
        "perplexity": texts,
        "tasks": tasks,
        "peak_memory_bytes": peak,
    }


@torch.no_grad()
def probe(model: nn.Module) -> float:
    """Seconds that `model` takes to read UNIT_TOKENS tokens, from a glimpse."""
    positions = getattr(model.config, "max_position_embeddings", None) or GLIMPSE
    ids = torch.zeros(1, min(GLIMPSE, positions), dtype=torch.int64)
    times = []
    for _ in range(3):  # the first pass touches memory that is new
        start = time.perf_counter()
        with fast_forward(model.device, model.dtype):
            output = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
        float(output.logits[0, -1, 0])
        times.append(time.perf_counter() - start)
    return min(times) * UNIT_TOKENS / ids.numel()


def answers(model: nn.Module, tokenizer: Any) -> list[dict[str, str]]:
    """How `model` continues PROMPTS, greedily: prompt and text, on one line each."""
    with stage("continuing prompts"):
        return [
            {
                "prompt": prompt,
                "text": " ".join(generate(model, tokenizer, prompt, SAMPLE_TOKENS).text.split()),
            }
            for prompt in PROMPTS
        ]


def speeds(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Prompt and decoding speed of both, measured in turns, JSON-ready."""
    found = measure_speeds({"dense": dense, "small": small}, SHORT)
    return {name: speed.to_dict() for name, speed in found.items()}
