"""Whether a pruned model is worth writing, and the verdict on it."""

from __future__ import annotations

from fastprune.errors import GateError
from fastprune.inspect.conclude import hopeless, of_pruning, risen
from fastprune.inspect.perplexity import Perplexity
from fastprune.inspect.record import Origin
from fastprune.inspect.verdict import HOPELESS, Case
from fastprune.messages import Message
from fastprune.pruning.config import PruneConfig
from fastprune.report import format
from fastprune.report.record import PruneRecord


def check_worth(
    config: PruneConfig,
    given: Perplexity,
    pruned: Perplexity,
    earlier: Origin | None,
    *,
    written: bool,
) -> None:
    """GateError where perplexity grew beyond the gate or, without one, beyond any use.

    ``given`` is that of the model as it came, whose origin is ``earlier``; ``written`` says that a
    folder was to be made.
    """
    kept = Message("the model in memory is cut, so load it again")
    if written:
        kept = Message("nothing was written")
    before, after = given.perplexity, pruned.perplexity
    grown = Message(
        "perplexity grew from {before} to {after}, a factor of {factor:.3g}",
        before=format.perplexity(before),
        after=format.perplexity(after),
        factor=after / before,
    )
    if config.gate_ppl_ratio is not None:
        if risen(before, after, config.gate_ppl_ratio):
            raise GateError(
                Message(
                    "{grown}; the gate is {gate:g}; {kept}",
                    grown=grown,
                    gate=config.gate_ppl_ratio,
                    kept=kept,
                )
            )
        return
    known = None
    if earlier is not None:
        known = earlier.figures((config.eval, given.seq_len, given.windows)).dense
    if hopeless(after, known or before) and not config.keep_worse:
        raise GateError(
            Message(
                "{grown}: beyond any use (more than {limit:g} times the dense model's); {kept}. "
                "Lower --ratio, leave --importance and --allocation at their defaults, or give "
                "--keep-worse to write it all the same",
                grown=grown,
                limit=HOPELESS,
                kept=kept,
            )
        )


def conclude(record: PruneRecord, config: PruneConfig, earlier: Origin | None) -> None:
    """Put where the model comes from into ``record`` and, where it was measured, the verdict."""
    origin = Origin.of_pruning(record.to_dict(), earlier)
    record.origin = origin.to_dict()
    if not record.perplexity:
        return
    p = record.perplexity[0]
    dense, removed = origin.figures((p["text"], p["seq_len"], p["windows"])).dense, origin.removed
    if dense is None:  # judged by the model that it was given, and what was removed of that
        dense, removed = p["before"], record.ratio["achieved"] or 0.0
    case = Case(
        model=record.model if config.out is None else str(config.out),
        finite=True,
        whole=True,
        band=None,
        measured=True,
        dense=origin.dense,
        made_by=record.command,
        removed=removed,
        masked=False,
    )
    record.verdict = of_pruning(case, p["after"], dense).to_dict()
