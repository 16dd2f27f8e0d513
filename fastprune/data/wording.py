"""The chat template of a model that has none: Alpaca's wording, in English or Chinese.

The wording is that of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca). The language is that
of what is asked first. A `context` beside the content of a message stands below a heading of its
own; a system message takes the place of the first sentence; further turns repeat the headings.
"""

from __future__ import annotations

from typing import Any

ALPACA = """\
{%- set asked = messages | selectattr('role', 'equalto', 'user') | first -%}
{%- set context = (asked.context or '') | trim -%}
{%- set question = asked.content ~ context -%}
{%- set count = namespace(han=0) -%}
{%- for sign in question if '㐀' <= sign <= '鿿' -%}
{%- if loop.last -%}{%- set count.han = loop.index -%}{%- endif -%}
{%- endfor -%}
{%- if 6 * count.han > question | length -%}
{%- set bare = '下面是一条描述任务的指令。请写出恰当完成这一请求的回答。' -%}
{%- set beside = '下面是一条描述任务的指令，并附有提供背景的输入。' ~
    '请写出恰当完成这一请求的回答。' -%}
{%- set heads = ['### 指令：', '### 输入：', '### 回答：'] -%}
{%- else -%}
{%- set bare = 'Below is an instruction that describes a task. ' ~
    'Write a response that appropriately completes the request.' -%}
{%- set beside = 'Below is an instruction that describes a task, paired with an input that ' ~
    'provides further context. Write a response that appropriately completes the request.' -%}
{%- set heads = ['### Instruction:', '### Input:', '### Response:'] -%}
{%- endif -%}
{%- if messages[0].role != 'system' -%}{{ beside if context else bare }}{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content | trim -%}
{%- if message.role == 'assistant' -%}
{{ '\n\n' ~ heads[2] ~ '\n' ~ content ~ eos_token }}
{%- elif message.role == 'system' -%}
{{ ('' if loop.first else '\n\n') ~ content }}
{%- else -%}
{{ '\n\n' ~ heads[0] ~ '\n' ~ content }}
{%- if message.context -%}{{ '\n\n' ~ heads[1] ~ '\n' ~ message.context | trim }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n\n' ~ heads[2] ~ '\n' }}{%- endif -%}"""
"""Chinese where more than a sixth of the characters are ideographs: such an instruction may quote
an English text."""


def default_template(tokenizer: Any) -> str:
    """The template for `tokenizer`, which writes the tokens that it puts before a text by itself.

    A chat template has to, since what it writes is tokenised as it is.
    """
    before, _ = affixes(tokenizer)
    return (tokenizer.decode(before) if before else "") + ALPACA


def has_context(template: str) -> bool:
    """Whether `template` is one of `default_template`, which takes a message's context apart."""
    return template.endswith(ALPACA)


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of what `tokenizer` puts before and after a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []
