"""Sentences for people: English in files and in Python, Chinese on a terminal that asks for it.

A `Message` is its English sentence and remembers what it was made of. The terminal shows what
`shown` makes of it: in a Chinese locale, or under ``FASTPRUNE_LANG=zh``, the entry of the catalogue
``messages.zh.json`` under its English template, filled with the same values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).with_name("messages.zh.json")


class Message(str):
    """A sentence in English, made of a ``template`` and ``values`` as `str.format` takes them.

    A value may be a message itself. The template has to be a literal, so that a test can hold the
    catalogue against all of them.
    """

    template: str
    values: Mapping[str, Any]

    def __new__(cls, template: str, /, **values: Any) -> Message:
        message = super().__new__(cls, template.format(**values))
        message.template, message.values = template, values
        return message

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:  # copies stay messages
        return (self.template,), dict(self.values)


def shown(value: Any) -> Any:
    """What the terminal shows of ``value``: a message in the user's language, else itself."""
    if not isinstance(value, Message):
        return value
    template = _chinese().get(value.template) if in_chinese() else None
    if template is None:
        return str(value)
    return template.format(**{name: shown(part) for name, part in value.values.items()})


def reason(error: BaseException) -> str:
    """The text of ``error`` as the terminal shows it."""
    return str(shown(error.args[0])) if len(error.args) == 1 else str(error)


def in_chinese() -> bool:
    """Whether ``FASTPRUNE_LANG`` or, where that is not set, the locale asks for Chinese."""
    names = ("FASTPRUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set decides
    language = next(filter(None, map(os.environ.get, names)), "")
    return language.lower().startswith("zh")


@cache
def _chinese() -> dict[str, str]:
    """The catalogue: Chinese templates by the English ones."""
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    assert isinstance(catalogue, dict)
    return catalogue
