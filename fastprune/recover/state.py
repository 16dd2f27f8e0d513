"""How far a stage has come: all that a checkpoint holds of it besides tensors and random states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastprune.recover.guard import GuardState
from fastprune.recover.monitor import Monitor


@dataclass
class State:
    """The counts of a stage, and what its monitor and its guard have seen."""

    step: int = 0
    """optimizer steps done"""
    tokens: int = 0
    masked_batches: int = 0
    """steps that had no token to learn from"""
    seconds: float = 0.0
    """of training, until this process took over"""
    stopped: str | None = None
    """why the stage ended early; None while it runs and when it went to its end"""
    evaluated_step: int = -1
    unseen: bool = False
    """prompts or an evaluation were due after the step, and an interrupt came before they ended"""
    bleu: dict[str, Any] | None = None
    """the last one measured, with the step it is of"""
    gave_up: str | None = None
    """the guard's last words"""
    monitor: Monitor = field(default_factory=Monitor)
    guard: GuardState = field(default_factory=GuardState)

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], pace: Mapping[str, Any]) -> tuple[State, bool]:
        """The state in a checkpoint to go on from, and whether `pace` is another than it had.

        After the guard gave up it begins its count anew, and at another pace the learning rates are
        those asked for now.
        """
        own = {key: saved[key] for key in cls.__dataclass_fields__ if key in saved}
        guard = GuardState(**own["guard"])
        if own.pop("gave_up", None):
            guard.rollbacks = guard.in_a_row = 0
        rescheduled = saved.get("pace", pace) != pace
        if rescheduled:
            guard.rate_factor = 1.0
        own |= {"monitor": Monitor(**own["monitor"]), "guard": guard}
        return cls(**own), rescheduled

    def saved(self, pace: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """What a checkpoint holds, as plain data; `more` replaces fields or joins them."""
        return asdict(self) | {"pace": dict(pace)} | more
