"""What is wrong with training data, how often, and where first; and how long its examples are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PROBLEMS: dict[str, tuple[bool, str]] = {
    "not json": (False, "a line that is not JSON"),
    "wrong fields": (False, "fields of this kind of data are missing or of another type"),
    "null": (False, "a field that is needed is null"),
    "empty prompt": (False, "nothing is asked"),
    "empty response": (False, "nothing is answered, so there is nothing to learn"),
    "empty text": (False, "a blank document"),
    "surrogates": (False, "lone surrogates (half characters), which no tokenizer takes"),
    "tool call": (False, "the assistant calls a tool instead of answering in words"),
    "other split": (False, "of a validation or test split, which is not trained on"),
    "template": (False, "the model's chat template refuses the conversation"),
    "all masked": (False, "no token is left to learn"),
    "duplicate": (False, "said before, word for word"),
    "replacement characters": (
        True,
        "U+FFFD: the text was decoded with errors before it came here",
    ),
    "mojibake": (True, "UTF-8 that was read in another encoding, such as â€™ for an apostrophe"),
    "last answer only": (True, "the chat template writes earlier answers in another way"),
    "over-long": (True, "longer than the sequence length: cut, the response's start kept"),
}
"""What can be found: whether the record is used all the same, and what is meant."""

MISREAD = re.compile(
    "|".join(
        f"[{lead}][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]{{{more}}}"
        for lead, more in (("Â-ß", 1), ("à-ï", 2), ("ð-ô", 3))
    )
)
"""What UTF-8 bytes look like in Latin-1 or Windows-1252: a lead byte and its continuations."""
SCRIPTS = (
    (0x00A0, 0x024F),  # Latin
    (0x0370, 0x04FF),  # Greek, Cyrillic
    (0x2000, 0x22FF),  # punctuation, symbols
    (0x3000, 0x9FFF),  # CJK
    (0xAC00, 0xD7AF),  # Hangul
    (0xFF00, 0xFFEF),  # full-width forms
    (0x1F000, 0x1FAFF),  # emoji
)
"""Where a misread character plausibly came from; French quotation marks after à, say, do not."""
GBK_MOJIBAKE = "锟斤拷"  # U+FFFD U+FFFD as UTF-8, read as GBK


class Unusable(Exception):
    """A record that cannot be trained on. Its text is a key of PROBLEMS."""

    def __init__(self, problem: str, reason: str = "") -> None:
        super().__init__(problem)
        self.reason = " ".join(reason.split())
        """what refused it, in its own words"""


@dataclass
class Finding:
    """One problem of the data."""

    problem: str
    """a key of PROBLEMS"""
    count: int
    first: str
    """where it occurs first"""
    reason: str = ""
    """what refused that one, in its own words, where something did"""

    @property
    def used(self) -> bool:
        """Whether the records that have it are trained on all the same."""
        return PROBLEMS[self.problem][0]

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        if not self.reason:
            del fields["reason"]
        return {**fields, "used": self.used, "meaning": PROBLEMS[self.problem][1]}

    def __str__(self) -> str:
        fate = "used" if self.used else "left out"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.count} × {self.problem} ({fate}), first at {self.first}{reason}"


class Findings:
    """Counts problems as they are met."""

    def __init__(self, found: Iterable[Finding] = ()) -> None:
        self._found = {finding.problem: finding for finding in found}

    def add(self, problem: str, where: str, count: int = 1, reason: str = "") -> None:
        finding = self._found.setdefault(problem, Finding(problem, 0, where, reason))
        finding.count += count

    def __iter__(self) -> Iterator[Finding]:
        """In the order of PROBLEMS."""
        return (self._found[problem] for problem in PROBLEMS if problem in self._found)


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths in tokens."""

    count: int
    total: int
    min: int
    median: float
    p90: float
    p99: float
    max: int
    over: float
    """share of them longer than the sequence length"""

    @classmethod
    def of(cls, lengths: np.ndarray, seq_len: int) -> LengthStatistics:
        """Statistics of `lengths` (n,), n ≥ 1."""
        median, p90, p99 = np.percentile(lengths, [50, 90, 99])
        return cls(
            count=len(lengths),
            total=int(lengths.sum(dtype=np.int64)),
            min=int(lengths.min()),
            median=float(median),
            p90=float(p90),
            p99=float(p99),
            max=int(lengths.max()),
            over=float(np.mean(lengths > seq_len)),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encoding_problems(text: str) -> list[str]:
    """The keys of PROBLEMS that concern the encoding of `text`. Raises Unusable for surrogates."""
    if text.isascii():
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("surrogates") from error
    found = []
    if "\ufffd" in text:
        found.append("replacement characters")
    if is_mojibake(text):
        found.append("mojibake")
    return found


def is_mojibake(text: str) -> bool:
    """Whether `text` holds UTF-8 that was decoded as Latin-1, Windows-1252 or GBK.

    Two Latin letters may follow each other by chance, so one pair is not enough; one triple is.
    """
    pairs = 0
    for match in MISREAD.finditer(text):
        code = _repaired(match[0])
        if any(first <= code <= last for first, last in SCRIPTS):
            if len(match[0]) > 2:
                return True
            pairs += 1
    return pairs > 1 or GBK_MOJIBAKE in text


def _repaired(misread: str) -> int:
    """The code point that the bytes of `misread` stand for; 0 if for none."""
    data = b"".join(
        char.encode("latin-1") if char <= "\xff" else char.encode("cp1252") for char in misread
    )
    try:
        return ord(data.decode())
    except UnicodeDecodeError:
        return 0
