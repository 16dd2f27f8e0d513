"""What a run of `prune` or `finetune` came to: a sentence, and the next command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastprune.inspect.record import Figures
from fastprune.inspect.verdict import (
    HOPELESS,
    Advice,
    Band,
    Case,
    advise,
    command,
    judge,
    judged,
    worse_than_guessing,
)
from fastprune.messages import Message
from fastprune.report import format

UNCHANGED = 1e-3
"""Relative change of a perplexity that says nothing: another order of the same sums, rounding."""
EXPLODED = 10.0
"""Times the perplexity before at which a text that was not what the model was taught counts as
harm: a model that answers writes plain text less well, one that is broken far worse."""


@dataclass(frozen=True)
class Conclusion:
    """The verdict of a run. ``bad``: the model is worse than before, or broken."""

    band: Band
    what: Message
    bad: bool
    advice: tuple[Advice, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self) | {"advice": [asdict(advice) for advice in self.advice]}


@dataclass(frozen=True)
class Trained:
    """A finetuning as it is judged: perplexities of the model before and after, and by what."""

    before: float
    after: float
    figures: Figures
    """of the dense and of the pruned model in the same windows"""
    removed: float
    """share of the dense model's block parameters that is gone"""
    dense: str | None
    """name of the dense model where it is known"""
    answers: bool = False
    """whether answers were taught: the text of the perplexities is not what it was to learn"""
    validation: tuple[float, float] | None = None
    """loss on the answers that were held out, before and after, where there are some"""

    @property
    def worse(self) -> bool:
        """Whether the training has done harm; a perplexity that is not a number counts as that."""
        exploded = risen(self.before, self.after, EXPLODED if self.answers else 1.0)
        return exploded or self.unlearnt

    @property
    def unlearnt(self) -> bool:
        """Whether the held-out loss has risen."""
        return self.validation is not None and risen(*self.validation)


@dataclass(frozen=True)
class Training:
    """How a model was trained, as one would ask for it again."""

    model: str
    data: str
    out: str
    adapter: bool
    taught: bool
    """by a teacher"""


def risen(before: float, after: float, times: float = 1.0) -> bool:
    """Whether a perplexity has risen beyond so many times what it was, by more than rounding."""
    return not after <= (1 + UNCHANGED) * times * before


def hopeless(after: float, dense: float) -> bool:
    """Whether a pruned model's perplexity is beyond any use; one that is no number is."""
    return not after <= HOPELESS * dense


def of_pruning(case: Case, after: float, dense: float) -> Conclusion:
    """The verdict on a pruned model of perplexity ``after``; ``case`` needs no band yet.

    ``dense`` is the perplexity in the same windows of the dense model, or of the model that was
    pruned where that is not known.
    """
    judgement = judge(after, dense, case.removed or 0.0)
    known = Case(**{**vars(case), "band": judgement.band})
    bad = judgement.band == "broken"
    return Conclusion(judgement.band, judged(after, judgement), bad, tuple(advise(known)))


def of_training(trained: Trained, training: Training) -> Conclusion:
    """The verdict on a finetuned model."""
    judgement = judge(trained.after, trained.figures.dense, trained.removed)
    what = judged(trained.after, judgement)
    if trained.worse:
        what = Message(
            "worse than before the training: {change}; {what}", change=change(trained), what=what
        )
    bad = trained.worse or judgement.band == "broken"
    return Conclusion(
        judgement.band, what, bad, (_after_training(trained, training, judgement.band),)
    )


def before_training(trained: Trained, vocabulary: int) -> Message | None:
    """A warning where the model is broken before its first step; ``after`` does not count."""
    figure = trained.before
    judgement = judge(figure, trained.figures.dense, trained.removed)
    if judgement.band == "broken":
        what = judged(figure, judgement)
        return Message("the model is broken before any training: {what}", what=what)
    return worse_than_guessing(figure, vocabulary)


def change(trained: Trained) -> Message:
    """The figure that the training is judged by, before and after."""
    if trained.validation is not None and trained.unlearnt:
        before, after = trained.validation
        return Message("validation loss {before:.4g} → {after:.4g}", before=before, after=after)
    return Message(
        "perplexity {before} → {after} ({factor})",
        before=format.perplexity(trained.before),
        after=format.perplexity(trained.after),
        factor=format.factor(trained.before, trained.after),
    )


def _after_training(trained: Trained, training: Training, band: Band) -> Advice:
    model, out = training.model, training.out.rstrip("/")
    again = ("--data", training.data, "--out", f"{out}-again")
    if trained.worse:
        return Advice(
            Message("Keep the model as it was and finetune it at a rate that suits it"),
            command("finetune", model, *again, "--find-lr"),
        )
    if training.adapter:
        return Advice(
            Message("Write the adapter into the model"),
            command("merge", model, "--adapter", out, "--out", f"{out}-merged"),
        )
    if band == "good":
        return Advice(Message("It is as good as can be expected; try it"),
                      command("generate", out, "--prompt", "The river"))  # fmt: skip
    if band == "unknown":
        compared = trained.dense is not None and trained.dense != out
        return Advice(
            Message("Compare it with the dense model"),
            command("diagnose", out, "--dense", str(trained.dense)) if compared else None,
        )
    if trained.dense is not None and not training.taught:
        return Advice(
            Message("Continue finetuning, with the dense model as the teacher"),
            command("finetune", out, *again, "--recipe", "distill", "--teacher", trained.dense),
        )
    return Advice(
        Message(
            "Continue finetuning, with more tokens; a gap that remains is due to what was removed"
        ),
        command("finetune", out, *again),
    )
