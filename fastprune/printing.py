"""What people read on a terminal and in a log: control characters are shown, never sent.

Names of tensors, files, recipes and adapters come from outside, and so does much of the text of an
error. A terminal obeys the control characters in them, and rich reads square brackets as markup.
Everything that is printed for people passes one of the three ways below; what a model answers goes
to stdout as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

MAX_LINE = 4000
"""Characters of an error, which may repeat what the user gave."""
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What is not shown but obeyed: C0 and C1 but for tab and line feed, the marks that turn the
direction of writing, other ends of lines; and halves of characters, which cannot be encoded."""


def visible(text: str) -> str:
    r"""`text` with every control character written as its escape, such as `\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` as one visible line, in its middle cut where it is longer than MAX_LINE."""
    line = visible(" ".join(text.split()))
    half = MAX_LINE // 2
    return line if len(line) <= MAX_LINE else f"{line[:half]} … {line[-half:]}"


class LogFormatter(logging.Formatter):
    """A formatter whose messages are one visible line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """As the parent class."""
        return visible(super().formatMessage(record).replace("\n", " "))


class Console(rich.console.Console):
    """rich's console without markup, on which control characters are visible."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As the parent class, which calls it for every string, before it is given room."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: Any, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As the parent class, which calls it for everything printed, a Text that was made before
        too."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)
