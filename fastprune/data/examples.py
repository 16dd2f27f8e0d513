"""Records to examples: which fields hold what.

| kind | fields |
|---|---|
| text | a string, or `text`, `content`, `sentence`, `document` |
| instructions | `instruction`, `prompt`, `question`, `query` or `problem` |
| | `output`, `response`, `answer`, `completion` or `solution` |
| | `input` or `context`, `system`, `history`: [[question, answer]] if there are any |
| chat | `messages`: [{`role`, `content`}], or `conversations`: [{`from`, `value`}] |
| | `prompt` and `completion` that hold such lists; a record that is one itself |

Names may be in capitals. Lists may be written as JSON in a string, as a table has them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.data.checks import Unusable
from fastprune.data.records import Record
from fastprune.data.text import PART_FIELDS, TEXT_FIELDS, small_names
from fastprune.errors import InputError
from fastprune.readers import parse_json

KINDS = ("text", "instructions", "chat")
PROMPT_FIELDS, CONTEXT_FIELDS, RESPONSE_FIELDS = PART_FIELDS
CHAT_FIELDS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "developer": "system",
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
TOOL_CALL = "function_call"
"""The speaker whose words are a call of a tool."""

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


def detect_kind(records: Iterable[Record], name: str, unread: Sequence[str] = ()) -> str:
    """The kind most of `records`, those of source `name`, are of. Raises InputError if of none.

    `unread` says of records that could not be read where and why; it may fill up meanwhile.
    """
    kinds: Counter[str] = Counter()
    first = None
    for record in records:
        first = first or record
        if kind := kind_of(record.value):
            kinds[kind] += 1
    if kinds:
        return kinds.most_common(1)[0][0]
    if first is None:
        reason = f": {unread[0]}" if unread else ""
        raise InputError(
            f"{name}: no text in it, or none that can be read as its suffix says{reason}"
        )
    seen = ", ".join(map(str, first.value)) if isinstance(first.value, dict) else "no fields"
    raise InputError(
        f"{first.where}: neither text ({', '.join(TEXT_FIELDS)}) nor a prompt with its response "
        f"({', '.join(PROMPT_FIELDS)} with {', '.join(RESPONSE_FIELDS)}) nor a chat (messages); "
        f"it has {seen}; name the fields with --columns prompt=FIELD,answer=FIELD"
    )


def kind_of(value: Any) -> str | None:
    """The kind of one record, by the names of its fields."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "chat" if value and all(isinstance(turn, dict) for turn in value) else None
    if not isinstance(value, dict):
        return None
    value = small_names(value)
    if _turns(value) is not None:
        return "chat"
    if _has(value, RESPONSE_FIELDS) and _has(value, PROMPT_FIELDS + CONTEXT_FIELDS):
        return "instructions"
    return "text" if _has(value, TEXT_FIELDS) else None


def text_of(value: Any) -> str:
    """The document in a record of kind text. Raises Unusable."""
    if isinstance(value, str):
        return value
    fields = small_names(value) if isinstance(value, dict) else {}
    if not _has(fields, TEXT_FIELDS):
        raise Unusable("wrong fields")
    return _string(fields, TEXT_FIELDS)


def example_of(value: Any, kind: str) -> Example:
    """The example in a record of kind instructions or chat. Raises Unusable."""
    if isinstance(value, list):
        value = {CHAT_FIELDS[0]: value}
    if not isinstance(value, dict):
        raise Unusable("wrong fields")
    value = small_names(value)
    turns = _turns(value)
    if kind == "instructions" and (turns is None or not _has(value, RESPONSE_FIELDS)):
        return _instruction(value)
    if turns is None:
        raise Unusable("null" if _has(value, CHAT_FIELDS) else "wrong fields")
    return _conversation(turns, _optional(value, ("system",)))


def _instruction(value: Mapping[str, Any]) -> Example:
    if not _has(value, RESPONSE_FIELDS) or not _has(value, PROMPT_FIELDS + CONTEXT_FIELDS):
        raise Unusable("wrong fields")
    context = _optional(value, CONTEXT_FIELDS)
    if _has(value, PROMPT_FIELDS):
        prompt = _string(value, PROMPT_FIELDS).strip()
    else:  # the input is all there is
        prompt, context = _string(value, CONTEXT_FIELDS).strip(), ""
    response = _string(value, RESPONSE_FIELDS, or_number=True).strip()
    if not prompt and not context:
        raise Unusable("empty prompt")
    if not response:
        raise Unusable("empty response")
    if not prompt:
        prompt, context = context, ""
    history = _history(value.get("history"))
    if history and context:  # what a context stands apart from is the first thing said
        prompt, context = f"{prompt}\n\n{context}", ""
    system = _optional(value, ("system",))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        *history,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]
    return Example(messages, context)


def _history(value: Any) -> list[Message]:
    """The earlier questions and answers of an instruction."""
    turns = _listed(value)
    if turns is None:
        if value and not _is_null(value):
            raise Unusable("wrong fields")
        return []
    messages = []
    for turn in turns:
        if isinstance(turn, dict):
            messages.append(_message(turn))
        elif isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn):
            roles = ("user", "assistant")
            messages += [{"role": role, "content": text} for role, text in zip(roles, turn)]
        else:
            raise Unusable("wrong fields")
    return messages


def _turns(value: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a conversation, or of a prompt and its completion; None where there are none."""
    for field in CHAT_FIELDS:
        if (turns := _listed(value.get(field))) is not None:
            return turns
    asked, answered = (
        next((value[field] for field in fields if field in value), None)
        for fields in (PROMPT_FIELDS, RESPONSE_FIELDS)
    )
    if not isinstance(asked, list) and not isinstance(answered, list):
        return None
    asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    if not isinstance(answered, list):
        answered = [{"role": "assistant", "content": answered}]
    return [*asked, *answered]


def _listed(value: Any) -> list[Any] | None:
    """`value` where it is a list, or JSON of one; None where it is something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _conversation(turns: list[Any], system: str) -> Example:
    messages = [_message(turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing answers it
    if not messages:
        raise Unusable("empty response")
    start = 1 if messages[0]["role"] == "system" else 0
    while messages[start:] and messages[start]["role"] in ("assistant", "tool"):
        del messages[start]  # said before anything was asked
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
        raise Unusable("empty prompt")
    if system and not start:
        messages.insert(0, {"role": "system", "content": system})
    for message in messages:
        if not message["content"].strip() and message["role"] != "system":
            asked = message["role"] != "assistant"
            raise Unusable("empty prompt" if asked else "empty response")
    return Example(messages)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("wrong fields")
    role = turn.get("role", turn.get("from"))
    if turn.get("tool_calls") or turn.get("function_call") or role == TOOL_CALL:
        raise Unusable("tool call")
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


def _string(value: Mapping[str, Any], fields: Iterable[str], *, or_number: bool = False) -> str:
    """The first string among `fields`, of which there is one at least; or the first number."""
    found = [value[field] for field in fields if field in value]
    for content in found:
        if isinstance(content, str):
            return content
        if or_number and _is_number(content):
            return str(content)
    raise Unusable("null" if any(map(_is_null, found)) else "wrong fields")


def _optional(value: Mapping[str, Any], fields: Iterable[str]) -> str:
    return next((value[f].strip() for f in fields if isinstance(value.get(f), str)), "")


def _is_number(content: Any) -> bool:
    number = isinstance(content, int | float) and not isinstance(content, bool)
    return number and math.isfinite(content)


def _is_null(content: Any) -> bool:
    return content is None or (isinstance(content, float) and math.isnan(content))
