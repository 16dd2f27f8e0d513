"""Fields that the user names, where their own names do not say what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastprune.data.checks import Unusable
from fastprune.errors import InputError

HELD = {
    "prompt": "prompt",
    "answer": "response",
    "context": "context",
    "system": "system",
    "history": "history",
    "messages": "messages",
    "text": "text",
}
"""What a column may hold, and the name under which records have it."""


@dataclass(frozen=True)
class Columns:
    """Where the parts of a record stand: pairs of what is held, a key of HELD, and its field."""

    fields: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> Columns:
        """The columns that `pairs` such as `prompt=question` name. Raises InputError."""
        fields: dict[str, str] = {}
        for pair in pairs:
            held, _, field = (part.strip() for part in pair.partition("="))
            if held not in HELD or not field:
                raise InputError(
                    f"--columns {pair}: write it as prompt=FIELD,answer=FIELD; what a field may "
                    f"hold is one of {', '.join(HELD)}"
                )
            if held in fields:
                raise InputError(f"--columns names two fields for {held}; name one")
            fields[held] = field
        return cls(tuple(fields.items())).checked()

    def checked(self) -> Columns:
        """Itself. Raises InputError unless it makes up a text, an instruction or a conversation."""
        held = {name for name, _ in self.fields}
        if held == {"text"} or held in ({"messages"}, {"messages", "system"}):
            return self
        if not {"prompt", "answer"} <= held or held & {"messages", "text"}:
            raise InputError(
                f"--columns names {', '.join(sorted(held))}: name prompt and answer (with context, "
                "system and history if there are any), or messages, or text alone"
            )
        return self

    @property
    def kind(self) -> str:
        """The kind of the records: text, instructions or chat."""
        held = {name for name, _ in self.fields}
        return "text" if "text" in held else "chat" if "messages" in held else "instructions"

    def of(self, value: Any) -> dict[str, Any]:
        """The record `value` with the named fields alone. Raises Unusable where one is missing."""
        if not isinstance(value, dict) or any(field not in value for _, field in self.fields):
            raise Unusable("wrong fields")
        return {HELD[held]: value[field] for held, field in self.fields}

    def check_first(self, value: Any, where: str) -> None:
        """Raise InputError where `value`, the record at `where`, lacks a named field."""
        if not isinstance(value, dict):
            raise InputError(f"{where}: no fields, so --columns does not apply")
        for _, field in self.fields:
            if field not in value:
                raise InputError(
                    f"{where}: no field {field!r} (--columns); it has {', '.join(map(str, value))}"
                )
