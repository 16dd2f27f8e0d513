"""Keeps non-finite numbers out of the weights, and brings a run back that cannot go on.

A single bad step needs nothing: the optimizer sees a non-finite gradient and leaves the weights
alone. The guard counts them. After several in a row the weights themselves are suspect (an
activation overflows every time): it brings back the last good state and halves the learning rate.
After several such returns it gives up.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import NumericalError
from fastprune.messages import Message
from fastprune.recover.freeze import halve_rates
from fastprune.sharding import local

LOSS_LIMIT = 1e6
"""A loss beyond this counts as non-finite: no language model is worse than its vocabulary's log."""

log = logging.getLogger("fastprune")


def poison(loss: Tensor) -> Tensor:
    """`loss`, but NaN in its gradient where it is NaN, infinite, or beyond LOSS_LIMIT.

    The optimizer then skips the step, on the device, without anyone waiting for the value.
    """
    value = loss.detach()
    return loss * torch.where(value <= LOSS_LIMIT, 1.0, math.nan).to(loss.dtype)


@torch.no_grad()
def bits(parameters: Iterable[Tensor]) -> list[int]:
    """For each of `parameters` a sum of the bits of its values, which a change of them changes.

    Of a sharded parameter this process's part counts.
    """
    sums = []
    for parameter in parameters:
        values = local(parameter.detach())
        integers = values.view(_INTEGERS[values.element_size()])
        sums.append(int(integers.sum(dtype=integers.dtype)))  # wraps around: no wider copy is made
    return sums


@dataclass
class GuardState:
    """What the guard has seen; saved with every checkpoint."""

    skipped: int = 0
    """steps skipped, when it was last read"""
    in_a_row: int = 0
    rollbacks: int = 0
    rate_factor: float = 1.0


_Kept = tuple[int, dict[str, Tensor], dict[str, Any]]  # step, weights, the optimizer's state
_Reading = tuple[int, Tensor, Any]  # step; skipped steps and loss scale (2,); when they are here
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_SKIPPED = 2  # in the optimizer's control: loss scale, sound steps since it grew, skipped steps


class Guard:
    """Watches one training.

    Args:
        model, optimizer, schedule: what is trained; the optimizer is a fastprune.AdamW.
        patience: bad steps in a row that bring back the last good state.
        rollbacks: give up after so many.
        delay: each look reads the device's counter as it was so many steps before. With 1 the
            device does a step while the host waits for the one before, so it never idles; bad
            steps in a row are then seen one step late, unless a sound one has ended them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        *,
        patience: int,
        rollbacks: int,
        delay: int = 0,
        state: GuardState | None = None,
    ) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.patience, self.limit, self.delay = patience, rollbacks, delay
        self.state = state or GuardState()
        self.state.skipped = int(optimizer.skipped_steps)
        self._readings: deque[_Reading] = deque()
        # The newest state may be the very one that overflows: it counts as good when a pass through
        # it has been sound, and until then the one before it stays.
        self._newest: _Kept | None = None
        self._good: _Kept | None = None

    def look(self, step: int) -> bool:
        """Look after optimizer step `step`; whether the last good state was brought back.

        Raises NumericalError when that has happened too often. The weights are then those of the
        last good state.
        """
        self._readings.append(self._read(step))
        if len(self._readings) <= self.delay:
            return False
        at, values, event = self._readings.popleft()
        if event is not None:
            event.synchronize()
        now, scale = values.tolist()
        state = self.state
        bad, state.skipped = now > state.skipped, int(now)
        if not bad and self._newest is not None and self._newest[0] < at:
            self._good, self._newest = self._newest, None
        # fp16: a skipped step lowers the loss scale until it fits, which is no trouble yet.
        if not bad or scale > 1.0:
            state.in_a_row = 0
            return False
        state.in_a_row += 1
        if state.in_a_row < self.patience:
            return False
        newest = int(self.optimizer.skipped_steps)  # waits for the device
        if newest - state.skipped < step - at:
            return False  # a step since then was sound: the next look will see it
        state.in_a_row += newest - state.skipped
        state.skipped = newest
        self._readings.clear()
        culprits = self.optimizer.culprits()
        log.warning(
            Message(
                "{count} steps in a row had a non-finite loss or gradient ({where})",
                count=state.in_a_row,
                where=_names(culprits),
            )
        )
        self._roll_back(step)
        return True

    def _roll_back(self, step: int) -> None:
        """Bring back the last good state and halve the rates. NumericalError where that has been
        done too often; the good state is back then too."""
        state, returned_to = self.state, self._restore()
        if state.rollbacks >= self.limit:
            raise NumericalError(
                Message(
                    "step {step}: {count} steps in a row had a non-finite loss or gradient, after "
                    "{rollbacks} returns to a good state, the last at {factor:g} of the learning "
                    "rate. Lower --lr, use --precision fp32, or look at the data and at the model: "
                    "fastprune diagnose MODEL",
                    step=step,
                    count=state.in_a_row,
                    rollbacks=state.rollbacks,
                    factor=state.rate_factor,
                )
            )
        state.rollbacks += 1
        state.rate_factor *= 0.5
        state.in_a_row = 0
        halve_rates(self.optimizer, self.schedule)
        log.warning(
            Message(
                "back to the state of step {step}, learning rate halved to {rate:.3g} (return "
                "{count} of {limit})",
                step=returned_to,
                rate=max(group["lr"] for group in self.optimizer.param_groups),
                count=state.rollbacks,
                limit=self.limit,
            )
        )

    def _read(self, step: int) -> _Reading:
        """Ask the device for what `step` comes to, without waiting for it."""
        optimizer = self.optimizer
        seen = torch.stack([optimizer.skipped_steps, optimizer.loss_scale])
        values = seen.to("cpu", non_blocking=True)  # into pinned memory
        event = None
        if seen.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(seen.device))
        return step, values, event

    def keep(self, step: int) -> None:
        """Remember the weights and the optimizer's state, on the host, as those of `step`."""
        weights = {n: _host(p) for n, p in self.params.items()}
        self._newest = step, weights, _host(self.optimizer.state_dict())

    @torch.no_grad()
    def _restore(self) -> int:
        """Bring back what was kept, the loss scale too: bad weights had driven it down.

        The count of skipped steps and the rates stay today's.
        """
        self._good, self._newest = self._good or self._newest, None
        if self._good is None:
            return 0
        step, weights, optimizer = self._good
        today = self.optimizer.state_dict()
        control = optimizer["fastprune"]["control"].clone()
        control[_SKIPPED] = today["fastprune"]["control"][_SKIPPED].to(control.device)
        for name, parameter in self.params.items():
            local(parameter).copy_(weights[name])
        self.optimizer.load_state_dict(
            {
                **optimizer,
                "param_groups": today["param_groups"],
                "fastprune": {**today["fastprune"], "control": control},
            }
        )
        return step


def _names(culprits: dict[str, int], shown: int = 3) -> str:
    """The first few of the parameters whose gradients were not finite, and how many more."""
    names = list(culprits)
    if not names:
        return Message("every gradient was finite by itself, their norm was not")
    few = ", ".join(names[:shown])
    if len(names) <= shown:
        return few
    return Message("{few} and {more} more", few=few, more=len(names) - shown)


def _host(value: Any) -> Any:
    """A copy of nested `value` with every tensor on the host; of a DTensor this process's part."""
    if isinstance(value, Tensor):
        return local(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_host(item) for item in value)
    return value
