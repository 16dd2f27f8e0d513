"""How fast models read and write: prompt tokens and decoded tokens a second, and the memory for it.

Models that are compared take turns, so that a machine which changes its speed from minute to minute
favours none of them. On a CUDA device decoding is one CUDA graph a token over a cache of fixed
size: launched one by one, the kernels of a small model take longer to launch than to run, and what
pruning gains would not show.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import StaticCache

from fastprune.errors import InputError
from fastprune.inspect.memory import Extra
from fastprune.models.attention import cache_keyword
from fastprune.models.seq2seq import is_seq2seq
from fastprune.progress import track

WARM_UP = 2
"""Steps of decoding before the clock counts."""
CONTEXT = 128
"""Tokens before the first one that is decoded."""
STEPS = 16
"""Tokens that a model decodes in one turn, of each sequence."""
ROOM = 64
"""Tokens that a cache of fixed size has room for behind its context where nothing is said."""

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Selection:
    """What is measured: lengths of prompts (batch 1), batches of decoding, turns of each model."""

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    turns: int


SHORT = Selection((512,), (1,), 3)
FULL = Selection((128, 512, 2048), (1, 8, 32), 5)


@dataclass(frozen=True)
class Rate:
    """Tokens a second: the median of the turns, the slowest turn and the fastest one."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One workload and its rate."""

    tokens: int
    """of each sequence: of the prompt, or before the first one that is decoded"""
    batch: int
    """sequences that are read or decoded at once; the rate counts the tokens of all"""
    tokens_per_second: Rate


@dataclass(frozen=True)
class Speed:
    """What one model did."""

    prompt: list[Measured]
    decoding: list[Measured]
    decoded_by: Literal["eager", "CUDA graph"]
    """how the steps of decoding were launched"""
    peak_memory_bytes: int
    """of the weights, and the most that a workload took beside them (CPU: 0 except on Linux)"""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)


class Work(Protocol):
    """Something whose turns are timed."""

    def turn(self) -> float:
        """Do it once; tokens a second."""


class Reading:
    """A model that reads prompts of ``tokens`` tokens, one at a time."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model = model
        self.ids = _zeros(model, 1, tokens)
        self.turn()  # the first pass touches memory that is new

    @torch.no_grad()
    def turn(self) -> float:
        """Read one prompt; tokens a second."""
        start = time.perf_counter()
        logits = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits
        float(logits[0, -1, 0])  # waits for the device
        return self.ids.numel() / (time.perf_counter() - start)


class Decoding:
    """A model that decodes token by token behind ``context`` tokens, ``batch`` sequences at once.

    ``module`` is a causal language model or its decoder. With a ``static`` cache, which is the
    default on CUDA and has room for ``steps`` steps, a step is a CUDA graph where there is one.
    """

    def __init__(
        self,
        module: nn.Module,
        context: int,
        *,
        batch: int = 1,
        steps: int = ROOM,
        static: bool | None = None,
    ) -> None:
        self.module = module
        self.batch = batch
        self.device = next(module.parameters()).device
        self.keyword = cache_keyword(module)
        self.cache: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None
        """logits, or hidden states of a decoder, of the last step"""
        on_cuda = self.device.type == "cuda"
        static = on_cuda if static is None else static
        if static:
            room = context + WARM_UP + steps
            self.cache = StaticCache(config=module.config, max_cache_len=room)
        self._token = _zeros(module, batch, 1)
        self._forward(_zeros(module, batch, context))
        if static and on_cuda:
            with torch.cuda.device(self.device):
                self.graph = self._captured()
        else:
            self._warm_up()

    def step(self) -> float:
        """Decode one token of each sequence; milliseconds."""
        self._wait()
        start = time.perf_counter()
        if self.graph is None:
            self._forward(self._token)
        else:
            self.graph.replay()
        self._wait()
        return 1000 * (time.perf_counter() - start)

    def turn(self) -> float:
        """Decode STEPS tokens of each sequence; tokens a second."""
        return self.batch * STEPS / (sum(self.step() for _ in range(STEPS)) / 1000)

    def _warm_up(self) -> None:
        for _ in range(WARM_UP):
            self._forward(self._token)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> None:
        output = self.module(input_ids=ids, use_cache=True, **{self.keyword: self.cache})
        self.cache, self.output = output[self.keyword], output[0]

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """A step as a graph; None for a model whose step cannot be one."""
        graph = torch.cuda.CUDAGraph()
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):  # libraries set themselves up before a graph is captured
            self._warm_up()
        stream.wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                self._forward(self._token)
        except RuntimeError as error:
            log.warning("decoding without a CUDA graph, which this model does not allow: %s", error)
            return None
        return graph

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_speeds(models: Mapping[str, nn.Module], selection: Selection) -> dict[str, Speed]:
    """The speed of each of `models`, by its name, in turns. They are left as they are.

    A prompt is never longer than a model has positions, and all models read the same ones. Raises
    InputError for encoder-decoder models.
    """
    if any(is_seq2seq(model) for model in models.values()):
        raise InputError(
            "speed is measured of decoder-only models, and this one has an encoder; leave it out"
        )
    steps = WARM_UP + selection.turns * STEPS
    context = min(fitting(model, CONTEXT, steps) for model in models.values())
    lengths = {min(fitting(model, n) for model in models.values()) for n in selection.prompts}
    contest = _Contest(models, selection.turns)
    prompt: dict[str, list[Measured]] = {name: [] for name in models}
    decoding: dict[str, list[Measured]] = {name: [] for name in models}
    for tokens in track(sorted(lengths), "measuring how fast prompts are read"):
        for name, rate in contest.rates(partial(Reading, tokens=tokens)).items():
            prompt[name].append(Measured(tokens, 1, rate))
    for batch in track(selection.batches, "measuring how fast tokens are decoded"):
        make = partial(Decoding, context=context, batch=batch, steps=steps)
        for name, rate in contest.rates(make).items():
            decoding[name].append(Measured(context, batch, rate))
    return {
        name: Speed(
            prompt[name],
            decoding[name],
            "CUDA graph" if name in contest.by_graph else "eager",
            _weights(model) + contest.extra[name],
        )
        for name, model in models.items()
    }


def fitting(model: nn.Module, tokens: int, steps: int = 0) -> int:
    """``tokens``, or as many as leave `model` positions for ``steps`` more; at least 1."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return tokens if positions is None else max(1, min(tokens, positions - steps))


class _Contest:
    """Models that do the same work in turns."""

    def __init__(self, models: Mapping[str, nn.Module], turns: int) -> None:
        self.models, self.turns = models, turns
        self.extra = dict.fromkeys(models, 0)
        """bytes that the work took beside the weights"""
        self.by_graph: set[str] = set()
        for model in models.values():
            Reading(model, 1)  # weights that are still in files come into memory

    def rates(self, make: Callable[[nn.Module], Work]) -> dict[str, Rate]:
        """The rate at which each model does the work that `make` prepares."""
        works: dict[str, Work] = {}
        for name, model in self.models.items():
            extra = Extra(next(model.parameters()).device)
            works[name] = make(model)
            self.extra[name] = max(self.extra[name], extra.bytes())
            if getattr(works[name], "graph", None) is not None:
                self.by_graph.add(name)
        turns: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.turns):
            for name, work in works.items():
                turns[name].append(work.turn())
        return {name: _rate(found) for name, found in turns.items()}


def _rate(turns: Sequence[float]) -> Rate:
    return Rate(statistics.median(turns), min(turns), max(turns))


def _weights(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of `model`."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _zeros(module: nn.Module, batch: int, tokens: int) -> Tensor:
    """Token ids (batch, tokens): speed does not depend on which."""
    device = next(module.parameters()).device
    return torch.zeros(batch, tokens, dtype=torch.int64, device=device)
