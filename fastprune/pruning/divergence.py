"""KL divergence of a changed model's next-token distribution from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastprune.kernels.ops import cross_entropy
from fastprune.kernels.reference import IGNORED
from fastprune.models.forward import Head, batches
from fastprune.models.layers import Layers
from fastprune.precision import fast_forward
from fastprune.pruning.calibration import Calibration

TOP = 64
"""Dense probabilities kept per token; the rest of the vocabulary counts as one outcome."""
EVERY = 4
"""One token in this many is compared, the last of them in each group: distributions of neighbours
are alike, and many texts tell more than many tokens of one."""
CHUNK_LOGITS = 2**24
"""Logits computed at a time: 64 MB in fp32."""


class DenseTargets:
    """The dense distribution at every calibration token, and the KL divergence from it.

    Per token the `TOP` most likely next tokens and the remaining mass are kept. The divergence
    between two distributions merged like that is a lower bound of the full one (data processing
    inequality), close to it because the dense model's own tail is thin, and it never needs the
    dense logits again: memory is 3·TOP numbers a token, not one per word of the vocabulary.
    """

    def __init__(self) -> None:
        self._indices: list[Tensor] = []
        self._logs: list[Tensor] = []

    @torch.no_grad()
    def append(self, hidden: Tensor, head: Head) -> None:
        """Record what the dense model's ``head`` reads (n, s, h) of the next batch."""
        indices, logs = [], []
        for logits in _logits(hidden, head):
            top, index = logits.topk(min(TOP, logits.shape[-1]))
            logs.append(_with_rest(top.float() - _log_normaliser(logits)))
            indices.append(index)
        self._indices.append(torch.cat(indices))
        self._logs.append(torch.cat(logs))

    @torch.no_grad()
    def divergence(self, batch: int, hidden: Tensor, head: Head) -> float:
        """Summed KL(dense ‖ changed) in nats over the tokens of ``batch``, given what the changed
        model's ``head`` reads."""
        start, total = 0, 0.0
        for logits in _logits(hidden, head):
            rows = slice(start, start + logits.shape[0])
            start += logits.shape[0]
            dense = self._logs[batch][rows]
            changed = logits.gather(1, self._indices[batch][rows]).float()
            changed = _with_rest(changed - _log_normaliser(logits))
            total += (dense.exp() * (dense - changed)).sum(-1).double().sum().item()
        return total


class Yardstick:
    """How far a model has gone from what it was, on fixed text.

    Args:
        calibration: the model as it is now, of which distributions are kept, not weights, and the
            windows (n, s) to measure on, at one token in `EVERY`. Every process measures all of
            them.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.windows = calibration.windows
        self._dense = DenseTargets()
        layers = calibration.layers
        for hidden in self._final(layers):
            self._dense.append(_compared(hidden), layers.head)

    @property
    def batches(self) -> Sequence[Tensor]:
        """The windows in the batches by which `mean` counts."""
        return batches(self.windows)

    def divergence(self, layers: Layers) -> float:
        """KL divergence of the model of ``layers`` from what it was, in nats a token."""
        return self.mean(self._final(layers), layers.head)

    def mean(self, finals: Iterable[Tensor], head: Head) -> float:
        """The same from what a model's ``head`` reads (n, s, h), batch after batch."""
        total = sum(
            self._dense.divergence(n, _compared(hidden), head) for n, hidden in enumerate(finals)
        )
        return total / _compared(self.windows).numel()

    def _final(self, layers: Layers) -> Iterator[Tensor]:
        return layers.final(self.batches, "divergence", fast=True)


def _compared(states: Tensor) -> Tensor:
    """Those of ``states`` (n, s, ...) that are compared, (n, s / EVERY, ...) rounded up."""
    return states[:, (states.shape[1] - 1) % EVERY :: EVERY]


def _logits(hidden: Tensor, head: Head) -> Iterator[Tensor]:
    size = max(1, CHUNK_LOGITS // head.weight.shape[0])
    for states in hidden.flatten(0, -2).split(size):
        with fast_forward(hidden.device, head.weight.dtype):
            logits = head(states)
        yield logits


def _log_normaliser(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) (t, 1) of logits (t, vocabulary), without a copy of them in fp32."""
    nothing = logits.new_full(logits.shape[:1], IGNORED, dtype=torch.int64)
    return cross_entropy(logits, nothing)[1][:, None]


def _with_rest(logs: Tensor) -> Tensor:
    """Log-probabilities (t, k) with the log of the remaining mass as one more column."""
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-7)  # fp32 sums to 1 within 1e-7
    return torch.cat([logs, rest.log()], -1)
