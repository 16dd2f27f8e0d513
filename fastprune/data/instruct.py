"""Examples to text, with the spans that are learnt: the answers, and the end after each.

By the tokenizer's chat template where it has one, else by Alpaca's wording, in English or Chinese
as the instruction is. An encoder–decoder model reads the bare prompt and answers with the response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.data.checks import Unusable
from fastprune.data.examples import Example, Message

CJK = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
LETTER = re.compile(r"[^\W\d_]")
CJK_SHARE = 0.2  # of the letters: a Chinese instruction may quote an English text
MARKED = re.compile(r"\{%-?\s*generation\b")
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""What ends a document in models whose EOS ends a turn of a conversation."""


@dataclass(frozen=True)
class Wording:
    """How an instruction is put to a model without a chat template."""

    bare: str
    with_context: str
    instruction: str
    context: str
    response: str


ENGLISH = Wording(
    bare=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    ),
    with_context=(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request."
    ),
    instruction="### Instruction:",
    context="### Input:",
    response="### Response:",
)
"""The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca)."""
CHINESE = Wording(
    bare="下面是一条描述任务的指令。请写出恰当完成这一请求的回答。",
    with_context="下面是一条描述任务的指令，并附有提供背景的输入。请写出恰当完成这一请求的回答。",
    instruction="### 指令：",
    context="### 输入：",
    response="### 回答：",
)


@dataclass(frozen=True)
class Rendered:
    """The text of an example."""

    text: str
    spans: list[tuple[int, int]]
    """characters that are learnt: [start, end), ascending"""
    special: bool
    """whether the tokenizer still has to put its own first token before it"""
    problem: str = ""
    """a key of checks.PROBLEMS that concerns it"""


def is_chinese(text: str) -> bool:
    """Whether `text` is Chinese (or other text in CJK ideographs), by its letters."""
    return len(CJK.findall(text)) > CJK_SHARE * len(LETTER.findall(text))


def has_template(tokenizer: Any) -> bool:
    """Whether `tokenizer` has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_marked(tokenizer: Any) -> bool:
    """Whether the chat template itself marks what the assistant generates."""
    template = tokenizer.chat_template if has_template(tokenizer) else ""
    return isinstance(template, str) and bool(MARKED.search(template))


def document_end(tokenizer: Any) -> int | None:
    """The id of the token that ends a document in a stream of text."""
    known = tokenizer.get_added_vocab()
    return next((known[end] for end in DOCUMENT_ENDS if end in known), tokenizer.eos_token_id)


def prompt_text(tokenizer: Any, messages: Sequence[Message], context: str = "") -> str:
    """What a model reads before it answers `messages`, in the wording it was trained with here."""
    if has_template(tokenizer):
        turns = chat_messages(messages, context)
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return _worded(tokenizer, messages, context).text


def source_text(example: Example) -> str:
    """What the encoder of an encoder–decoder model reads: all before the last answer."""
    return "\n".join(m["content"] for m in chat_messages(example.messages[:-1], example.context))


def render(tokenizer: Any, example: Example) -> Rendered:
    """`example` as one text with its learnt spans. Raises Unusable if the template refuses it."""
    if has_template(tokenizer):
        return _templated(tokenizer, chat_messages(example.messages, example.context))
    return _worded(tokenizer, example.messages, example.context)


def chat_messages(messages: Sequence[Message], context: str) -> list[Message]:
    """The messages with the context below the first thing the user says."""
    turns = [dict(message) for message in messages]
    if context:
        asked = next(turn for turn in turns if turn["role"] == "user")
        asked["content"] += f"\n\n{context}"
    return turns


def apply_template(tokenizer: Any, messages: list[Message], **options: Any) -> Any:
    """What `apply_chat_template` makes of `messages`. Raises Unusable if the template refuses."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise Unusable("template") from error  # whatever the template asks for in vain


def _templated(tokenizer: Any, messages: list[Message]) -> Rendered:
    text = _text(tokenizer, messages)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_span(tokenizer, text, messages, n) for n in answers]
    last = spans[-1]
    if last is None:
        raise Unusable("template")
    problem = ""
    if None in spans:
        spans, problem = [last], "last answer only"
    found = [_without_tail(text, span) for span in spans if span is not None]
    start, end = found[-1]
    if tokenizer.eos_token and not _ends_special(tokenizer, text[:end]):
        text = text[:end] + tokenizer.eos_token
        found[-1] = (start, len(text))
    return Rendered(text, found, False, problem)


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


def _worded(tokenizer: Any, messages: Sequence[Message], context: str) -> Rendered:
    """Alpaca's form; further turns repeat its headings, and a system message its first sentence."""
    asked = next(m["content"] for m in messages if m["role"] == "user")
    words = CHINESE if is_chinese(asked + context) else ENGLISH
    text = words.with_context if context else words.bare
    end = tokenizer.eos_token or ""
    spans = []
    for message in messages:
        content = message["content"].strip()
        match message["role"]:
            case "system":
                text = content
            case "assistant":
                start = len(text)
                text += content + end
                spans.append((start, len(text)))
            case _:
                text += f"\n\n{words.instruction}\n{content}\n\n"
                if context and not spans:
                    text += f"{words.context}\n{context}\n\n"
                text += f"{words.response}\n"
    return Rendered(text, spans, True)
