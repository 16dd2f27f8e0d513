"""Records to examples: which fields hold what.

| kind | fields |
|---|---|
| text | a string, or `text`, `content`, `sentence`, `document` |
| instructions | `instruction`, `prompt` or `question`; `input` or `context` if there is any |
| | `output`, `response`, `answer` or `completion`; `system` if there is any |
| chat | `messages`: [{`role`, `content`}], or `conversations`: [{`from`, `value`}] |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastprune.data.checks import Unusable
from fastprune.data.records import Record
from fastprune.data.text import PART_FIELDS, TEXT_FIELDS
from fastprune.errors import InputError

KINDS = ("text", "instructions", "chat")
PROMPT_FIELDS, CONTEXT_FIELDS, RESPONSE_FIELDS = PART_FIELDS
CHAT_FIELDS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The names that data sets give the speakers, as chat templates call them."""

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation to learn the assistant's part of."""

    messages: list[Message]
    """{"role", "content"}, at least one of the user's before the first of the assistant's"""
    context: str = ""
    """what an instruction is about, where that stands apart"""

    @property
    def texts(self) -> tuple[str, ...]:
        """All it says: what makes two examples the same."""
        return (self.context, *(m["content"] for m in self.messages))


def detect_kind(records: Iterable[Record], name: str) -> str:
    """The kind most of `records`, those of source `name`, are of. Raises InputError if of none."""
    kinds: Counter[str] = Counter()
    first = None
    for record in records:
        first = first or record
        if kind := kind_of(record.value):
            kinds[kind] += 1
    if kinds:
        return kinds.most_common(1)[0][0]
    if first is None:
        raise InputError(f"{name}: no text in it, or none that can be read as its suffix says")
    seen = ", ".join(map(str, first.value)) if isinstance(first.value, dict) else "no fields"
    raise InputError(
        f"{first.where}: neither text ({', '.join(TEXT_FIELDS)}) nor a prompt with its response "
        f"({', '.join(PROMPT_FIELDS)} with {', '.join(RESPONSE_FIELDS)}) nor a chat (messages); "
        f"it has {seen}"
    )


def kind_of(value: Any) -> str | None:
    """The kind of one record, by the names of its fields."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, dict):
        return None
    if any(isinstance(value.get(field), list) for field in CHAT_FIELDS):
        return "chat"
    if _has(value, RESPONSE_FIELDS) and _has(value, PROMPT_FIELDS + CONTEXT_FIELDS):
        return "instructions"
    return "text" if _has(value, TEXT_FIELDS) else None


def text_of(value: Any) -> str:
    """The document in a record of kind text. Raises Unusable."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not _has(value, TEXT_FIELDS):
        raise Unusable("wrong fields")
    return _string(value, TEXT_FIELDS)


def example_of(value: Any, kind: str) -> Example:
    """The example in a record of kind instructions or chat. Raises Unusable."""
    if not isinstance(value, dict):
        raise Unusable("wrong fields")
    return _conversation(value) if kind == "chat" else _instruction(value)


def _instruction(value: Mapping[str, Any]) -> Example:
    if not _has(value, RESPONSE_FIELDS) or not _has(value, PROMPT_FIELDS + CONTEXT_FIELDS):
        raise Unusable("wrong fields")
    context = _optional(value, CONTEXT_FIELDS)
    if _has(value, PROMPT_FIELDS):
        prompt = _string(value, PROMPT_FIELDS).strip()
    else:  # the input is all there is
        prompt, context = _string(value, CONTEXT_FIELDS).strip(), ""
    response = _string(value, RESPONSE_FIELDS).strip()
    if not prompt and not context:
        raise Unusable("empty prompt")
    if not response:
        raise Unusable("empty response")
    if not prompt:
        prompt, context = context, ""
    system = _optional(value, ("system",))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]
    return Example(messages, context)


def _conversation(value: Mapping[str, Any]) -> Example:
    turns = next((value[f] for f in CHAT_FIELDS if isinstance(value.get(f), list)), None)
    if turns is None:
        raise Unusable("null" if _has(value, CHAT_FIELDS) else "wrong fields")
    messages = [_message(turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing answers it
    if not messages:
        raise Unusable("empty response")
    roles = [message["role"] for message in messages]
    if "user" not in roles[: roles.index("assistant")]:
        raise Unusable("empty prompt")
    for message in messages:
        if not message["content"].strip() and message["role"] != "system":
            asked = message["role"] != "assistant"
            raise Unusable("empty prompt" if asked else "empty response")
    return Example(messages)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("wrong fields")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # parts, of which only texts can be learnt here
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Unusable("wrong fields")
        content = "".join(texts)
    if content is None and ("content" in turn or "value" in turn):
        raise Unusable("null")
    if not isinstance(content, str) or not isinstance(role, str) or role.lower() not in ROLES:
        raise Unusable("wrong fields")
    return {"role": ROLES[role.lower()], "content": content}


def _has(value: Mapping[str, Any], fields: Iterable[str]) -> bool:
    return any(field in value for field in fields)


def _string(value: Mapping[str, Any], fields: Iterable[str]) -> str:
    """The first string among `fields`, of which there is one at least."""
    found = [value[field] for field in fields if field in value]
    for content in found:
        if isinstance(content, str):
            return content
    raise Unusable("null" if None in found else "wrong fields")


def _optional(value: Mapping[str, Any], fields: Iterable[str]) -> str:
    return next((value[f].strip() for f in fields if isinstance(value.get(f), str)), "")
