"""The text that a model is calibrated on, and its hidden states at the front of a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastprune.distributed import ALONE, Processes
from fastprune.models.forward import batches
from fastprune.models.layers import Layers
from fastprune.pruning.moments import (
    After,
    Moments,
    advance,
    collect,
    collect_routed,
    completed,
)

HELD_OUT = 8
"""One calibration batch in this many, and the last, judge a refit instead of entering it."""

TEXT_PER_RANDOM = 4
"""Beside so many calibration windows a refit sees one of random tokens."""


@dataclass(frozen=True)
class Calibration:
    """A model as ``layers``, and token ``windows`` (n, s) of the text that it is calibrated on.

    Where several ``processes`` share the work, each has its own of the windows and batches below.
    """

    layers: Layers
    windows: Tensor
    processes: Processes = ALONE

    def part(self, windows: slice) -> Calibration:
        """The same model with some of the windows."""
        return replace(self, windows=self.windows[windows])

    def single(self) -> Sequence[Tensor]:
        """The windows one by one (1, s)."""
        return self.processes.share(self.windows.split(1))

    def batches(self) -> Sequence[Tensor]:
        """The windows in batches (b, s)."""
        return self.processes.share(batches(self.windows))

    def random_windows(self) -> Tensor:
        """Windows (n // TEXT_PER_RANDOM, s) of tokens from all of the vocabulary, which begin with
        what all of the text's begin with.

        Where the calibration text says little they hold a refit to what the dense model does.
        """
        vocabulary = self.layers.model.get_input_embeddings().num_embeddings
        shape = (len(self.windows) // TEXT_PER_RANDOM, self.windows.shape[1])
        words = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
        opening = (self.windows == self.windows[:1]).all(0).cumprod(0).bool()
        words[:, opening] = self.windows[0, opening]
        return words

    def fitting(
        self, *, random: bool, batch_size: int | None = None
    ) -> Sequence[tuple[Tensor, bool]]:
        """Batches for a refit, with ``random`` those of `random_windows` too, and which of them are
        held out.

        Text alone is held out, unless it is one batch, which then does for both.
        """
        text = batches(self.windows, batch_size)
        last = len(text) - 1
        found = [(ids, n % HELD_OUT == HELD_OUT - 1 or n == last) for n, ids in enumerate(text)]
        if random and len(words := self.random_windows()):
            found += [(ids, last == 0) for ids in batches(words, batch_size)]
        return self.processes.share(found)


class Prefix:
    """The hidden states of calibration text at the front of the layers that are done.

    They are those of the batches of `Calibration.fitting`, kept at ``place``, by default on the
    host. Each process keeps those of its own batches and counts their moments; what follows from
    moments is the same in all of them. Layers are loaded by the caller.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        random: bool,
        batch_size: int | None = None,
        place: torch.device | None = None,
    ) -> None:
        found = calibration.fitting(random=random, batch_size=batch_size)
        self.layers, self.processes = calibration.layers, calibration.processes
        self.held_out = [held_out for _, held_out in found]
        self.states = self.layers.embed([ids for ids, _ in found], place or torch.device("cpu"))
        self.dense: list[Tensor] | None = None

    def part_from_dense(self) -> None:
        """Keep the dense model's hidden states beside these from here on, unless that is so."""
        if self.dense is None:
            self.dense = [hidden.clone() for hidden in self.states]

    def advance_dense(self, index: int, targets: Sequence[nn.Linear]) -> After:
        """Carry the dense model's states, if any, through layer ``index``, which is dense now.

        What they are behind ``targets`` comes back, as from `advance`.
        """
        if self.dense is None:
            return {}
        return advance(self.layers, index, self.dense, targets, self.processes)

    def advance(self, index: int) -> None:
        """Carry the hidden states through layer ``index`` as it is now."""
        advance(self.layers, index, self.states)

    def moments(
        self, index: int, linears: Sequence[nn.Linear], after: After | None = None
    ) -> dict[nn.Linear, tuple[Moments, Moments]]:
        """Moments of the inputs of ``linears`` in layer ``index``: to fit, and held out."""
        seen = collect(self.layers, index, linears, self.states, self.held_out, after)
        return completed(seen, self.processes)

    def routed_moments(
        self, index: int, experts: nn.Module, linears: Mapping[int, nn.Linear]
    ) -> dict[int, tuple[Moments, Moments]]:
        """Moments of what the output matrices ``linears`` of ``experts`` in layer ``index`` read
        of the tokens routed to them."""
        seen = collect_routed(self.layers, index, experts, linears, self.states, self.held_out)
        return completed(seen, self.processes)
