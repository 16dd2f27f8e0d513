"""The range of a setting, declared beside it and checked in one place.

A numeric field of a configuration may say `Annotated[int, Range(1, 1024)]`. What says nothing still
has to be finite, and to fit into 64 bits where it is a whole number: nothing below would bear more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, get_args, get_type_hints

from fastprune.errors import InputError

INTEGERS = (-(2**63), 2**63 - 1)
"""The whole numbers of 64 bits."""

LARGEST = 1e12
"""Of a number that says nothing: no setting is larger, and its square is finite in float32."""
EXCLUDED = {
    (True, True): "",
    (True, False): ", 1 excluded",
    (False, True): ", 0 excluded",
    (False, False): ", both excluded",
}


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, the ends among them where `closed` says so."""

    least: float = -LARGEST
    most: float = LARGEST
    closed: tuple[bool, bool] = (True, True)

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value`, in words that follow "must"; None where nothing is."""
        if not math.isfinite(value):
            return "be a finite number"
        (low, high), (least, most) = self.closed, (self.least, self.most)
        if (least <= value if low else least < value) and (value <= most if high else value < most):
            return None
        if (least, most) == (0, 1):
            return f"lie between 0 and 1{EXCLUDED[self.closed]}"
        if value <= least:
            if least == 0 and not low:
                return "be positive"
            return f"be {'at least' if low else 'above'} {least:g}"
        return f"be {'at most' if high else 'below'} {_written(most)}"


POSITIVE = Range(0, closed=(False, True))
SHARE = Range(0, 1)
STEPS = Range(1, 10**9)
"""Of things that are done one after the other."""
LENGTH = Range(2, 2**24)
"""Tokens of a window."""
RATE = Range(0, 1000, closed=(False, True))
"""A learning rate."""
MINUTES = Range(0, 366 * 24 * 60, closed=(False, True))
"""At most a year."""


def check_ranges(config: Any, *declared_by: type[Any]) -> None:
    """InputError where a number in the dataclass `config` lies outside its range.

    Ranges are those of its own fields, or of fields of the same name in the dataclasses
    `declared_by`.
    """
    kinds: tuple[Any, ...] = (type(config), *declared_by)
    found = {name: span for kind in kinds for name, span in _of(kind)}
    for name, (span, whole) in found.items():
        value = getattr(config, name, None)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, Real) and not isinstance(number, bool):
                _check(f"--{name.replace('_', '-')}", number, span, whole)


def _check(flag: str, number: Any, span: Range, whole: bool) -> None:
    if whole and not INTEGERS[0] <= number <= INTEGERS[1]:
        raise InputError(f"{flag} must fit into 64 bits, which {_written(number)} does not")
    if problem := span.complaint(number):
        raise InputError(f"{flag} must {problem}, not {_written(number)}")


@cache
def _of(kind: Any) -> tuple[tuple[str, tuple[Range, bool]], ...]:
    """The numeric fields of the dataclass `kind`: name, range, and whether of whole numbers."""
    found = []
    plain, annotated = (get_type_hints(kind, include_extras=extras) for extras in (False, True))
    for name, hint in annotated.items():
        kinds = {plain[name], *get_args(plain[name])}
        if kinds & {int, float}:
            spans = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
            found.append((name, (spans[0] if spans else Range(), float not in kinds)))
    return tuple(found)


def _written(number: Any) -> str:
    text = str(number)
    return text if len(text) <= 30 else f"{text[:10]}… ({len(text)} digits)"
