"""KL divergence of a changed model's next-token distribution from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastprune.inspect.perplexity import batches, decoder_and_head
from fastprune.kernels.ops import cross_entropy
from fastprune.kernels.reference import IGNORED
from fastprune.precision import fast_forward

TOP = 64
"""Dense probabilities kept per token; the rest of the vocabulary counts as one outcome."""
CHUNK_LOGITS = 2**24
"""Logits computed at a time: 64 MB in fp32."""


class DenseTargets:
    """The dense distribution at every calibration token, and the KL divergence from it.

    Per token the `TOP` most likely next tokens and the remaining mass are kept. The divergence
    between two distributions merged like that is a lower bound of the full one (data processing
    inequality), close to it because the dense model's own tail is thin, and it never needs the
    dense logits again: memory is 3·TOP numbers a token, not one per word of the vocabulary.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self._indices: list[Tensor] = []
        self._logs: list[Tensor] = []

    @torch.no_grad()
    def append(self, hidden: Tensor) -> None:
        """Record the dense final hidden states (n, s, h) of the next batch."""
        indices, logs = [], []
        for logits in self._logits(hidden):
            top, index = logits.topk(min(TOP, logits.shape[-1]))
            logs.append(_with_rest(top.float() - _log_normaliser(logits)))
            indices.append(index)
        self._indices.append(torch.cat(indices))
        self._logs.append(torch.cat(logs))

    @torch.no_grad()
    def divergence(self, batch: int, hidden: Tensor) -> float:
        """Summed KL(dense ‖ changed) in nats over the tokens of ``batch``, given final states."""
        start, total = 0, 0.0
        for logits in self._logits(hidden):
            rows = slice(start, start + logits.shape[0])
            start += logits.shape[0]
            dense = self._logs[batch][rows]
            changed = logits.gather(1, self._indices[batch][rows]).float()
            changed = _with_rest(changed - _log_normaliser(logits))
            total += (dense.exp() * (dense - changed)).sum(-1).double().sum().item()
        return total

    def _logits(self, hidden: Tensor):  # type: ignore[no-untyped-def]
        size = max(1, CHUNK_LOGITS // self.head.weight.shape[0])
        for states in hidden.flatten(0, -2).split(size):
            with fast_forward(hidden.device, self.head.weight.dtype):
                logits = self.head(states)
            yield logits


class Yardstick:
    """How far a model has gone from what it was, on fixed text.

    Args:
        model: as it is now; its distributions are kept, not its weights.
        windows: token ids (n, s).
    """

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.windows = windows
        self._dense = DenseTargets(decoder_and_head(model)[1])
        for hidden in self._states(model):
            self._dense.append(hidden)

    @property
    def batches(self) -> Sequence[Tensor]:
        """The windows in the batches by which `mean` counts."""
        return batches(self.windows)

    def divergence(self, model: nn.Module) -> float:
        """KL divergence of ``model`` from what it was, in nats a token."""
        return self.mean(self._states(model))

    def mean(self, states: Iterable[Tensor]) -> float:
        """The same from a model's final hidden states (n, s, h), batch after batch."""
        sums = (self._dense.divergence(n, hidden) for n, hidden in enumerate(states))
        return sum(sums) / self.windows.numel()

    @torch.no_grad()
    def _states(self, model: nn.Module) -> Iterator[Tensor]:
        decoder, head = decoder_and_head(model)
        for ids in self.batches:
            ids = ids.to(head.weight.device)
            with fast_forward(ids.device, head.weight.dtype):
                yield decoder(input_ids=ids, use_cache=False).last_hidden_state


def _log_normaliser(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) (t, 1) of logits (t, vocabulary), without a copy of them in fp32."""
    nothing = logits.new_full(logits.shape[:1], IGNORED, dtype=torch.int64)
    return cross_entropy(logits, nothing)[1][:, None]


def _with_rest(logs: Tensor) -> Tensor:
    """Log-probabilities (t, k) with the log of the remaining mass as one more column."""
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-7)  # fp32 sums to 1 within 1e-7
    return torch.cat([logs, rest.log()], -1)
