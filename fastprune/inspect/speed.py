"""How fast a model reads and writes: prompt tokens and decoded tokens a second, at batch 1.

Models that are compared take turns, so that a machine which changes its speed from minute to minute
favours none of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastprune.models.attention import cache_keyword
from fastprune.progress import track

WARM_UP = 2
"""Steps of decoding before the clock counts."""
PROMPT, CONTEXT = 512, 128
"""Tokens of the prompt that is read, and before the first one that is decoded."""
TURNS, STEPS = 3, 16
"""Turns that each model takes, and tokens that it decodes in each."""


@dataclass(frozen=True)
class Speed:
    """Medians over the turns, at batch 1."""

    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_context: int
    decode_tokens_per_second: float

    def to_dict(self) -> dict[str, float | int]:
        """The fields as JSON knows them."""
        return asdict(self)


class Decoding:
    """A model that decodes token by token behind ``context`` tokens, at batch 1.

    ``module`` is a causal language model or its decoder.
    """

    def __init__(self, module: nn.Module, context: int) -> None:
        self.module = module
        self.device = next(module.parameters()).device
        self.keyword = cache_keyword(module)
        self.cache = self._run(context, None)
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> float:
        """Decode one token; milliseconds."""
        self._wait()
        start = time.perf_counter()
        self.cache = self._run(1, self.cache)
        self._wait()
        return 1000 * (time.perf_counter() - start)

    @torch.no_grad()
    def _run(self, tokens: int, cache: Any) -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        output = self.module(input_ids=ids, use_cache=True, **{self.keyword: cache})
        return output[self.keyword]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_speeds(models: Mapping[str, nn.Module]) -> dict[str, Speed]:
    """The speed of each of `models`, by its name. They are left as they are."""
    length = {name: _fitting(model) for name, model in models.items()}
    decoding = {name: Decoding(model, min(CONTEXT, length[name])) for name, model in models.items()}
    prompts: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        _read(model, length[name])  # the first pass touches memory that is new
    for _ in track(range(TURNS), "measuring speed"):
        for name, model in models.items():
            prompts[name].append(_read(model, length[name]))
            tokens[name] += [decoding[name].step() / 1000 for _ in range(STEPS)]
    return {
        name: Speed(
            length[name],
            length[name] / statistics.median(prompts[name]),
            min(CONTEXT, length[name]),
            1 / statistics.median(tokens[name]),
        )
        for name in models
    }


def _fitting(model: nn.Module) -> int:
    """Tokens of a prompt, leaving room to decode behind it."""
    positions = getattr(model.config, "max_position_embeddings", None) or PROMPT
    return max(1, min(PROMPT, positions - WARM_UP - TURNS * STEPS))


@torch.no_grad()
def _read(model: nn.Module, tokens: int) -> float:
    """Seconds for a prompt of so many tokens."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    start = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    float(logits[0, -1, 0])  # waits for the device
    return time.perf_counter() - start
