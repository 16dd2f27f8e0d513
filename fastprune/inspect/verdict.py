"""From what was found to a verdict, and from a verdict to the next command.

Perplexity is judged by its ratio to the dense model's in the same windows. What may be expected
depends on how much was removed; the bands below are those of dense 8-billion-parameter models at
128 tokens, whose own perplexity is about 10, divided by that 10 (docs/guides/diagnose.md). Where no
dense figure is known nothing is judged: the absolute bands of large models say little of a
small one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt
from typing import Literal

from fastprune.data.builtin import EVALUATION_TEXT
from fastprune.inspect.record import Windows
from fastprune.messages import Message
from fastprune.report import format

Severity = Literal["broken", "warning", "note"]
Band = Literal["good", "careful", "too high", "broken", "unknown"]

REMOVED = ((0.0, 1.0, 3.0), (0.15, 1.1, 3.0), (0.20, 1.3, 4.0), (0.25, 1.5, 5.0), (0.30, 1.8, 7.0))
"""Share of the block parameters removed; perplexity, in multiples of the dense one, up to which the
result is normal; and beyond which it is broken. Straight lines between, and on beyond the last."""
WORDS: dict[Band, Message] = {
    "good": Message("good"),
    "careful": Message("careful"),
    "too high": Message("too high"),
    "broken": Message("broken"),
}
ABSOLUTE: tuple[tuple[float, Band], ...] = ((15.0, "good"), (25.0, "careful"), (50.0, "too high"))
SAME = 1.02
"""A ratio to the dense perplexity that is good whatever was removed."""
HOPELESS = 100.0
"""A ratio to the dense perplexity from which a model is beyond any use."""


CODE = "--trust-remote-code"


@dataclass(frozen=True)
class Finding:
    """One thing that was seen. ``broken`` makes the model unhealthy."""

    severity: Severity
    what: Message


@dataclass(frozen=True)
class Advice:
    """What to do next and, where one command does it, that command."""

    text: Message
    command: str | None = None


@dataclass(frozen=True)
class Judgement:
    """The band a perplexity lies in, and by what it was judged."""

    band: Band
    by: Message


def judge(perplexity: float, dense: float | None, removed: float) -> Judgement:
    """The judgement of `prune`, `finetune` and `diagnose` alike.

    ``dense`` is the dense model's perplexity in the same windows where it is known, ``removed`` the
    share of its block parameters that is gone.
    """
    if dense is None:
        return judge_absolute(perplexity)
    return judge_ratio(perplexity / dense, removed)


def judge_ratio(factor: float, removed: float) -> Judgement:
    """``factor``: perplexity over the dense one; ``removed``: share of block parameters."""
    normal, broken = expected(max(0.0, removed))
    between = sqrt(normal * broken)  # halfway, for a quantity that multiplies
    steps: tuple[tuple[float, Band], ...] = (
        (max(normal, SAME), "good"),
        (between, "careful"),
        (broken, "too high"),
    )
    band: Band = next((band for limit, band in steps if factor <= limit), "broken")
    return Judgement(
        band,
        Message(
            "×{factor:.3g} of the dense one; with {removed} of the blocks removed ×{normal:.2g} is "
            "normal, beyond ×{broken:.2g} something is broken",
            factor=factor,
            removed=format.percent(removed),
            normal=normal,
            broken=broken,
        ),
    )


def judge_absolute(perplexity: float) -> Judgement:
    """For want of a dense figure: unknown, and what it would be for 8 billion parameters."""
    band: Band = next((band for limit, band in ABSOLUTE if perplexity < limit), "broken")
    return Judgement(
        "unknown",
        Message(
            "cannot judge without the dense model: fastprune diagnose MODEL --dense DENSE "
            "(by the absolute bands of large models it would be {band})",
            band=WORDS[band],
        ),
    )


def worse_than_guessing(perplexity: float, vocabulary: int) -> Message | None:
    """A sentence where every token of the ``vocabulary`` by turns would be as good a guess."""
    if perplexity < vocabulary:
        return None
    return Message(
        "perplexity {figure} is no better than guessing among all {vocabulary:,} tokens",
        figure=format.perplexity(perplexity),
        vocabulary=vocabulary,
    )


def expected(removed: float) -> tuple[float, float]:
    """Normal and broken multiples of the dense perplexity when a share ``removed`` is gone."""
    steps = list(pairwise(REMOVED))
    (x0, *low), (x1, *high) = next((pair for pair in steps if removed <= pair[1][0]), steps[-1])
    share = (removed - x0) / (x1 - x0)
    normal, broken = (a + (b - a) * share for a, b in zip(low, high))
    return normal, broken


def verdict(findings: Sequence[Finding]) -> Message:
    """healthy, careful, or unhealthy: as bad as the worst finding."""
    severities = {finding.severity for finding in findings}
    if "broken" in severities:
        return Message("unhealthy")
    return Message("careful") if "warning" in severities else Message("healthy")


@dataclass(frozen=True)
class Case:
    """What advice depends on. ``dense`` is the dense model's name where known; ``made_by`` the
    command that made the model, by its own record."""

    model: str
    finite: bool
    whole: bool
    """sizes fit together, the model loads, its output is finite"""
    band: Band | None
    measured: bool
    dense: str | None
    made_by: str | None
    removed: float | None
    masked: bool
    """there are heads or channels that add nothing"""
    overflows: str | None = None
    """the dtype that activations leave, though weights and sizes are sound"""
    known: Windows | None = None
    """windows in which the dense perplexity is known"""
    flags: tuple[str, ...] = ()
    """what was needed to load the model, and is again"""


def advise(case: Case) -> list[Advice]:
    """What to do next, the most urgent first; commands can be run as they stand."""
    if not case.finite:
        return [_remake(case, Message("Values that are NaN or Inf cannot be trained away"))]
    if case.overflows == "float16":
        text = Message("Nothing is wrong with the weights: run it in a dtype of larger range")
        return [Advice(text, _command(case, "diagnose", case.model, "--dtype", "bfloat16"))]
    if not case.whole:
        return [_remake(case, Message("The checkpoint is damaged or was cut wrongly"))]
    advice = [_by_band(case) if case.measured else _measure(case)]
    if case.masked:
        text = Message("Dead heads and channels cost time and add nothing: prune them away")
        advice.append(Advice(text, None))
    return advice


def _measure(case: Case) -> Advice:
    against = ["--dense", case.dense] if case.dense else []
    return Advice(
        Message("Sound weights say little about quality: measure it"),
        _command(case, "diagnose", case.model, "--text", EVALUATION_TEXT, *against),
    )


def _by_band(case: Case) -> Advice:
    out = f"{case.model.rstrip('/')}-recovered"
    recover = ("finetune", case.model, "--out", out)
    if case.band == "careful":
        text = Message("Usable, but it lost quality: finetune it")
        return Advice(text, _command(case, *recover))
    if case.band == "too high":
        if case.dense is None:
            return Advice(Message("Finetune it in stages, with a gate after each"),
                          _command(case, *recover, "--recipe", "staged"))  # fmt: skip
        return Advice(
            Message("It lost much: finetune it with the dense model as the teacher"),
            _command(case, *recover, "--recipe", "distill", "--teacher", case.dense),
        )
    if case.band == "broken":
        text = Message("Too much was lost for finetuning to be the first remedy")
        if case.dense is None or case.removed is None:
            return _remake(case, text)
        careful = ("--allocation", "search", "--compensate", "least-squares")
        done = case.made_by is not None and all(word in case.made_by for word in careful)
        ratio = max(0.05, round(case.removed / 2 if done else case.removed, 2))
        less = Message("remove less")
        remedy = less if done else Message("prune again, with search and compensation")
        return Advice(
            Message("{why}: {remedy}", why=text, remedy=remedy),
            _command(case, "prune", case.dense, "--out", f"{case.model.rstrip('/')}-again",
                     "--ratio", f"{ratio:g}", *careful),
        )  # fmt: skip
    if case.band == "unknown":
        return _judgeable(case)
    return Advice(Message("Nothing needs to be done; try it"),
                  _command(case, "generate", case.model, "--prompt", "The river"))  # fmt: skip


def _judgeable(case: Case) -> Advice:
    """How to come to a perplexity that can be judged."""
    if case.known is not None:
        text, seq_len, windows = case.known
        return Advice(
            Message("The dense model was measured in other windows: use the same windows"),
            _command(case, "diagnose", case.model, "--text", text, "--seq-len", str(seq_len),
                    "--windows", str(windows)),
        )  # fmt: skip
    compared = case.dense is not None and case.dense != case.model
    return Advice(
        Message("It can only be judged against the dense model: name that model"),
        _command(case, "diagnose", case.model, "--dense", str(case.dense)) if compared else None,
    )


def _remake(case: Case, why: Message) -> Advice:
    if case.made_by:
        text = Message("{why}: check the dense model, then make it again", why=why)
        return Advice(text, case.made_by)
    if case.dense and case.dense != case.model:
        text = Message("{why}: check what it was made of", why=why)
        return Advice(text, _command(case, "diagnose", case.dense))
    return Advice(
        Message("{why}: go back to the last good checkpoint, or fetch the model again", why=why)
    )


def _command(case: Case, *words: str) -> str:
    """A command line, with the flags that the model of ``case`` needs to be loaded."""
    flags = list(case.flags)
    if "--dtype" in words and "--dtype" in flags:
        place = flags.index("--dtype")
        del flags[place : place + 2]
    if words[0] == "prune" and CODE in flags:
        flags.remove(CODE)  # it takes no models that bring their own code
    return command(*words, *flags)


def command(*words: str) -> str:
    """A command line of fastprune that can be pasted into a shell."""
    return shlex.join(["fastprune", *words])


def band_finding(perplexity: float, judgement: Judgement) -> Finding:
    """A perplexity and its judgement as a finding."""
    severity: Severity = "note"
    if judgement.band == "broken" or not isfinite(perplexity):
        severity = "broken"
    elif judgement.band not in ("good", "unknown"):
        severity = "warning"
    return Finding(severity, judged(perplexity, judgement))


def judged(perplexity: float, judgement: Judgement) -> Message:
    """A perplexity and its judgement as a sentence."""
    figure, by = format.perplexity(perplexity), judgement.by
    if judgement.band == "unknown":
        return Message("perplexity {figure}: {by}", figure=figure, by=by)
    band = WORDS[judgement.band]
    return Message("perplexity {figure} is {band}: {by}", figure=figure, band=band, by=by)
