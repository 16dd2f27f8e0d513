"""Examples to text, with the spans that are learnt: the answers, and the end after each.

All goes through a chat template: the tokenizer's own, or, where it has none, one of Alpaca's
wording (`wording.py`). So a prompt is put to a model in the words it was trained with. An
encoder–decoder model reads the bare prompt and answers with the response.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.data.checks import Unusable
from fastprune.data.examples import Example, Message
from fastprune.data.wording import default_template, has_context
from fastprune.errors import InputError
from fastprune.readers import in_time

MARKED = re.compile(r"\{%-?\s*generation\b")
THINKING = re.compile(r"(<(think|thinking|thought|reasoning)>)\s*$")
"""The end of a prompt that has the model think before it answers."""
TEMPLATE_SECONDS = 10.0
"""Time for one conversation, of which a template takes milliseconds."""
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""What ends a document in models whose EOS ends a turn of a conversation."""


@dataclass(frozen=True)
class Rendered:
    """The text of an example."""

    text: str
    spans: list[tuple[int, int]]
    """characters that are learnt: [start, end), ascending"""
    problem: str = ""
    """a key of checks.PROBLEMS that concerns it"""


def has_template(tokenizer: Any) -> bool:
    """Whether `tokenizer` has a chat template of its own."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_of(tokenizer: Any) -> str:
    """The chat template that conversations are put by: the tokenizer's own, or the default one.

    Raises InputError where it has several by name, and none of them is the default, or one that is
    no text.
    """
    template = getattr(tokenizer, "chat_template", None)
    named = template.values() if isinstance(template, dict) else [template or ""]
    if not all(isinstance(one, str) for one in named):
        raise InputError(
            "the tokenizer's chat template is not text; mend its tokenizer_config.json"
        )
    if not isinstance(template, dict):
        return template or default_template(tokenizer)
    if len(template) > 1 and "default" not in template:
        raise InputError(
            f"the tokenizer has chat templates named {', '.join(sorted(template))} and none named "
            "default: save the one to use as chat_template.jinja beside it"
        )
    return template.get("default") or next(iter(template.values()))


def with_template(tokenizer: Any) -> Any:
    """`tokenizer`, or a copy of it, with the template that conversations are put by as its own."""
    template = template_of(tokenizer)
    if getattr(tokenizer, "chat_template", None) == template:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def is_marked(tokenizer: Any) -> bool:
    """Whether the chat template itself marks what the assistant generates."""
    return bool(MARKED.search(template_of(tokenizer)))


def document_end(tokenizer: Any) -> int | None:
    """The id of the token that ends a document in a stream of text."""
    known = tokenizer.get_added_vocab()
    return next((known[end] for end in DOCUMENT_ENDS if end in known), tokenizer.eos_token_id)


def prompt_text(tokenizer: Any, messages: Sequence[Message], context: str = "") -> str:
    """What a model reads before it answers `messages`, in the wording it is trained with here.

    Raises InputError where the chat template refuses them.
    """
    turns = chat_messages(tokenizer, messages, context)
    try:
        return _text(tokenizer, turns, add_generation_prompt=True)
    except Unusable as problem:
        reason = problem.reason or "it gives no reason"
        raise InputError(f"the chat template refuses this conversation: {reason}") from problem


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the token that ends an answer: the special one that the chat template puts there.

    Where it puts none the EOS, which is taught in its place; None where there is none either.
    """
    asked, answer = {"role": "user", "content": "Hello."}, "Good morning."
    turns = [asked, {"role": "assistant", "content": answer}]
    try:
        _, found, after = _text(tokenizer, turns).rpartition(answer)
    except Unusable:  # the simplest of conversations
        return tokenizer.eos_token_id
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = bool(ids) and ids[0] in special | set(tokenizer.all_special_ids)
    return ids[0] if ends else tokenizer.eos_token_id


def source_text(example: Example) -> str:
    """What the encoder of an encoder–decoder model reads: all before the last answer."""
    return source_of(_merged(example.messages[:-1], example.context))


def source_of(messages: Sequence[Message]) -> str:
    """What the encoder of an encoder–decoder model reads of `messages` before it answers."""
    return "\n".join(message["content"] for message in messages)


def render(tokenizer: Any, example: Example) -> Rendered:
    """`example` as one text with its learnt spans. Raises Unusable if the template refuses it."""
    return _templated(tokenizer, chat_messages(tokenizer, example.messages, example.context))


def chat_messages(tokenizer: Any, messages: Sequence[Message], context: str) -> list[Message]:
    """The messages as the template takes them: the context of the first question beside it, or,
    where the template knows none, below it."""
    if not has_context(template_of(tokenizer)):
        return _merged(messages, context)
    turns = [dict(message) for message in messages]
    if context:
        next(turn for turn in turns if turn["role"] == "user")["context"] = context
    return turns


def _merged(messages: Sequence[Message], context: str) -> list[Message]:
    turns = [dict(message) for message in messages]
    if context:
        asked = next(turn for turn in turns if turn["role"] == "user")
        asked["content"] += f"\n\n{context}"
    return turns


def apply_template(tokenizer: Any, messages: list[Message], **options: Any) -> Any:
    """What `apply_chat_template` makes of `messages`. Raises Unusable if the template refuses.

    A system message that the template refuses stands at the head of what the user says first.
    """
    options = {"chat_template": template_of(tokenizer), **options}
    try:
        return _applied(tokenizer, messages, options)
    except Exception as error:  # a template is a program, and fails in as many ways
        refusal = error
    if (others := _without_system(messages)) is not None:
        try:
            return _applied(tokenizer, others, options)
        except Exception:
            pass  # the first reason is the one that concerns the conversation as it is
    raise Unusable("template", str(refusal) or type(refusal).__name__) from refusal


def _applied(tokenizer: Any, messages: list[Message], options: dict[str, Any]) -> Any:
    """What the template makes of `messages`. Raises what it raises, TimeoutError where it does not
    come to an end, and UnicodeError where it makes what is no text."""
    made = in_time(
        lambda: tokenizer.apply_chat_template(messages, **options),
        TEMPLATE_SECONDS,
        "it takes too long",
    )
    if isinstance(made, str):
        made.encode()
    return made


def _without_system(messages: list[Message]) -> list[Message] | None:
    """The messages with that of the system in the one after it; None where the two are not so."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    system, asked, *rest = messages
    return [{**asked, "content": f"{system['content']}\n\n{asked['content']}"}, *rest]


def _templated(tokenizer: Any, messages: list[Message]) -> Rendered:
    text = _text(tokenizer, messages)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_span(tokenizer, text, messages, n) for n in answers]
    if (last := spans[-1]) is None:
        text, last = _after_thinking(tokenizer, text, messages)
        spans = [None] * (len(spans) - 1) + [last]
    problem = ""
    if None in spans:
        spans, problem = [last], "last answer only"
    found = [_without_tail(text, span) for span in spans if span is not None]
    start, end = found[-1]
    if tokenizer.eos_token and not _ends_special(tokenizer, text[:end]):
        text = text[:end] + tokenizer.eos_token
        found[-1] = (start, len(text))
    return Rendered(text, found, problem)


def _after_thinking(
    tokenizer: Any, text: str, messages: list[Message]
) -> tuple[str, tuple[int, int]]:
    """The conversation `text` where the prompt ends in a mark that opens a thought.

    The answer then begins with what it thinks, or with the end of an empty thought. Raises Unusable
    where that is not why the prompt is not the beginning of `text`.
    """
    before = _text(tokenizer, messages[:-1], add_generation_prompt=True)
    content = messages[-1]["content"].strip()
    mark = THINKING.search(before)
    if mark is None or not text.startswith(before[: mark.start()]):
        raise Unusable("template", "it writes what was said before an answer in another way")
    opened, closed = mark[1], f"</{mark[2]}>"
    said = content.rpartition(closed)[2].strip()
    _, found, end = text[mark.start() :].rpartition(said or content)
    if not found or not said:
        raise Unusable("template", "it does not write the answer as it is")
    if content.startswith(opened):
        content = content.removeprefix(opened).lstrip()
    elif closed not in content:
        content = f"\n{closed}\n\n{content}"
    return before + content + end, (len(before), len(before) + len(content) + len(end))


def _span(tokenizer: Any, text: str, messages: list[Message], n: int) -> tuple[int, int] | None:
    """Where `text` holds the answer `messages[n]`; None if what comes before is written otherwise.

    The text up to the answer, and with it, must be the beginning of the whole, as it is when the
    model answers it turn by turn.
    """
    before = _text(tokenizer, messages[:n], add_generation_prompt=True)
    whole = n == len(messages) - 1
    after = text if whole else _text(tokenizer, messages[: n + 1])
    if text.startswith(before) and text.startswith(after) and len(before) < len(after):
        return len(before), len(after)
    return None


def _text(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    return apply_template(tokenizer, messages, tokenize=False, **options)


def _without_tail(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """`span` without the white space after the end of the turn, which no one generates."""
    start, end = span
    return start, start + len(text[start:end].rstrip())


def _ends_special(tokenizer: Any, text: str) -> bool:
    if text.endswith(tokenizer.eos_token):  # nearly always, and quickly said
        return True
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return text.endswith(tuple(special | set(tokenizer.all_special_tokens)))
