"""Training data as people look at it: what it was taken for, where it came from, one sample."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from torch import Tensor

from fastprune.data.records import hub_parts
from fastprune.data.tokenise import Part
from fastprune.data.training import TrainingData
from fastprune.kernels.reference import IGNORED

LEARNT = "⟦", "⟧"
"""Around what is learnt."""
MOST_FILES = 3  # named
MOST_CHARACTERS = 400  # of a stretch that is learnt, or not; what is longer loses its middle
MOST_STRETCHES = 12


def describe(data: TrainingData, tokenizer: Any) -> list[str]:
    """A few lines about `data`, each printable as it is: control characters are escaped.

    Every source with its kind, its files and the splits left out of it; then the first sample as
    the model sees it, what is learnt between LEARNT.
    """
    lines = [escaped(f"data: {_source(part)}") for part in data.parts]
    first, last = LEARNT
    lines.append(f"the first sample as the model sees it; what is learnt stands in {first} {last}:")
    return [*lines, _sample(data.train[0], tokenizer)]


def escaped(text: str) -> str:
    """`text` on one line, whatever would not print as a character written as Python writes it."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _source(part: Part) -> str:
    source = part.source
    name, read = source.name, ""
    if source.called is not None:  # of the hub
        _, _, split = hub_parts(name)
        read = f", split {split}"
    elif len(source.files) > 1 or source.held_out:
        read = f", from {_named([file.name for file in source.files])}"
    if source.held_out:
        read += f"; of other splits, not read: {_named([file.name for file in source.held_out])}"
    count = f"{part.records:,} record{'s' if part.records != 1 else ''}"
    return f"{name}: taken for {part.kind}, {count}{read}"


def _named(names: list[str]) -> str:
    more = len(names) - MOST_FILES
    return ", ".join(names[:MOST_FILES]) + (f" and {more} more" if more > 0 else "")


def _sample(item: dict[str, Tensor], tokenizer: Any) -> str:
    """The item as text. An encoder–decoder model reads the input and says the labels."""
    ids, labels = item["input_ids"], item["labels"]
    if ids.shape == labels.shape and bool(((labels == ids) | (labels == IGNORED)).all()):
        tokens, learnt_ones = ids.tolist(), (labels != IGNORED).tolist()
    else:
        tokens = ids.tolist() + labels.tolist()
        learnt_ones = [False] * len(ids) + [True] * len(labels)
    pairs = zip(tokens, learnt_ones)
    stretches = []
    for learnt, group in groupby(pairs, key=lambda pair: pair[1]):
        text = _shortened(escaped(tokenizer.decode([token for token, _ in group])))
        stretches.append(text.join(LEARNT) if learnt else text)
    more = " …" if len(stretches) > MOST_STRETCHES else ""
    return "".join(stretches[:MOST_STRETCHES]) + more


def _shortened(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"
