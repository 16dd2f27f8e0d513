"""What a finetuning came to: its gates, whether it did harm, and the verdict on the result."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from fastprune.errors import GateError, NumericalError
from fastprune.inspect.conclude import (
    Trained,
    Training,
    before_training,
    change,
    of_training,
    risen,
)
from fastprune.inspect.record import Figures
from fastprune.messages import Message
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.folder import RunFolder
from fastprune.recover.guard import bits
from fastprune.recover.stage import Course
from fastprune.report import format

log = logging.getLogger("fastprune")


def check_changed(model: nn.Module, given: list[int], results: list[dict[str, Any]]) -> None:
    """NumericalError when stages were kept and yet ``model`` has the `bits` that were ``given``.

    The stages have changed the weights, but not by so much that it shows once they are rounded.
    """
    if not any(r["kept"] for r in results) or bits(model.parameters()) != given:
        return
    steps = sum(r["steps"] for r in results)
    dtype = str(model.dtype).removeprefix("torch.")
    raise NumericalError(
        Message(
            "0 of {steps} steps changed the weights by as much as {dtype} can hold. Raise --lr, or "
            "keep the result in --dtype float32; no checkpoint was written",
            steps=steps,
            dtype=dtype,
        )
    )


def check_gates(config: FinetuneConfig, folder: RunFolder) -> None:
    """GateError where the last stage was rolled back, unless the result is kept all the same.

    A stage that failed earlier had one after it that was kept.
    """
    results = folder.record["results"]
    if not results or results[-1]["kept"] or config.keep_worse:
        return
    failed = results[-1]
    p = failed["perplexity"]
    before, after = format.perplexity(p["before"]), format.perplexity(p["after"])
    message = Message(
        "{stage}: perplexity went from {before} to {after}, its gate is {gate:g} times; nothing "
        "was written",
        stage=failed["name"],
        before=before,
        after=after,
        gate=failed["gate"],
    )
    kept = ", ".join(r["name"] for r in results if r["kept"])
    if kept and folder.lasting:
        message = Message(
            "{failed}. The weights from before it (perplexity {before}, {kept} kept) are in "
            "{file}: the same command with --keep-worse makes them the result",
            failed=message,
            before=before,
            kept=kept,
            file=folder.state / f"start-{folder.record['stage']}.safetensors",
        )
    elif kept:
        message = Message(
            "{failed}. The weights from before it (perplexity {before}, {kept} kept) are the "
            "result with --keep-worse",
            failed=message,
            before=before,
            kept=kept,
        )
    raise GateError(message)


def check_gain(course: Course, after: float | None) -> None:
    """GateError where the perplexity ``after`` is beyond --gate-ppl-ratio or, without that, where
    the training did harm: what that is, `Trained` says."""
    config, before = course.config, course.folder.record.get("before")
    if before is None or after is None:
        return
    went = Message(
        "perplexity went from {before} to {after}, a factor of {factor:.3g}",
        before=format.perplexity(before),
        after=format.perplexity(after),
        factor=after / before,
    )
    trained = _trained(course, before, after)
    if config.gate_ppl_ratio is not None:
        if risen(before, after, config.gate_ppl_ratio):
            raise GateError(
                Message(
                    "{went}; the gate is {gate:g}; no checkpoint was written",
                    went=went,
                    gate=config.gate_ppl_ratio,
                )
            )
    elif trained.worse and not config.keep_worse:
        raise GateError(
            Message(
                "{went}: the training made the model worse. MODEL is as it was and no checkpoint "
                "was written; lower --lr or let --find-lr choose it, or give the same command with "
                "--keep-worse to have the result all the same",
                went=change(trained) if trained.unlearnt else went,
            )
        )
    elif trained.answers and risen(before, after):
        log.warning(
            Message(
                "{went} on {text}, which is not what was taught: the result is written; "
                "--gate-ppl-ratio 1 would forbid it",
                went=went,
                text=config.eval,
            )
        )


def warn_of_broken(model: nn.Module, course: Course, before: float) -> None:
    """Say before the first step that ``model``, whose perplexity is ``before``, is broken."""
    found = before_training(_trained(course, before, before), model.config.vocab_size)
    if found is not None:
        log.warning(
            Message(
                "{found}. Finetuning seldom repairs that; fastprune diagnose says what to do",
                found=found,
            )
        )


def outcome(course: Course, after: float | None, total: int, *, adapter: bool) -> dict[str, Any]:
    """`origin` and `verdict` of the run as metrics.json holds them, each where it is known.

    ``total`` are the parameters of the model now, ``after`` is its perplexity.
    """
    config, before = course.config, course.folder.record.get("before")
    found: dict[str, Any] = {}
    if course.origin is not None:
        found["origin"] = course.origin.with_params(total).to_dict()
    if before is None or after is None:
        return found
    training = Training(
        model=config.model or "MODEL",
        data=config.data,
        out=str(config.out or "OUT"),
        adapter=adapter,
        taught=config.teacher is not None,
    )
    return {**found, "verdict": of_training(_trained(course, before, after), training).to_dict()}


def _trained(course: Course, before: float, after: float) -> Trained:
    """The perplexities beside those of the dense and the pruned model in the same windows."""
    origin = course.origin
    if origin is None or course.windows is None:
        known = Figures(None, None), 0.0, course.config.teacher
    else:
        count, seq_len = course.windows.shape
        figures = origin.figures((course.config.eval, seq_len, count))
        known = figures, origin.removed, origin.dense
    losses = course.folder.record.get("validation", {})
    both = (losses["before"], losses["after"]) if {"before", "after"} <= losses.keys() else None
    return Trained(before, after, *known, answers=course.teaches_answers, validation=both)
