"""The tokenizer in a `.gguf` file, and which pre-tokenizer llama.cpp knows by which name.

A byte-level BPE tokenizer cuts a text into pieces before it merges. In the file these rules have a
name only (`tokenizer.ggml.pre`), in a `tokenizer.json` they are written out; one table serves both
directions. transformers' own reader takes GPT-2's rules whatever the file says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}\p{{N}}|{REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = "digits"
"""Every digit by itself."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens in `tokenizer.ggml.token_type`."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""A token for one byte of a character that the vocabulary has no token for."""


@dataclass(frozen=True)
class Rules:
    """How a text is cut before merging: patterns, one after the other, and whether a piece that is
    a token already is left unmerged."""

    steps: tuple[str, ...]
    ignore_merges: bool = False


PRE = {
    "gpt-2": Rules((GPT2,)),
    "default": Rules((GPT2,)),
    "smollm": Rules((DIGITS, GPT2)),
    "llama-bpe": Rules((LLAMA3,), ignore_merges=True),
    "smaug-bpe": Rules((LLAMA3,)),
    "qwen2": Rules((QWEN2,)),
    "tekken": Rules((TEKKEN,), ignore_merges=True),
}
"""The rules by the names that llama.cpp gives them."""
ALIASES = {"starcoder": "smollm", "refact": "smollm", "deepseek-r1-qwen": "qwen2"}
"""Further names of the same rules."""


def rules_of(backend: Mapping[str, Any]) -> Rules | None:
    """The rules of a `tokenizer.json`, parsed; None where they are of another kind than `PRE`."""
    steps = []
    step = backend["pre_tokenizer"] or {}
    for part in step["pretokenizers"] if step.get("type") == "Sequence" else [step]:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps += [GPT2] if part.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append(DIGITS)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior}:
                invert = part.get("invert", False)
                if (behavior, invert) not in (("Isolated", False), ("Removed", True)):
                    return None
                steps.append(pattern)
            case _:
                return None
    return Rules(tuple(steps), bool(backend["model"].get("ignore_merges")))


def pre_name(backend: Mapping[str, Any]) -> str | None:
    """The name of the pre-tokenizer of a `tokenizer.json`, parsed, or None if it has none."""
    rules = rules_of(backend)
    return next((name for name, known in PRE.items() if known == rules), None)


def has_known_words(fields: Mapping[str, Any]) -> bool:
    """Whether `read_tokenizer` can read the tokenizer that `fields` describe."""
    name = fields.get("tokenizer.ggml.pre", "default")
    return fields.get("tokenizer.ggml.model") == "gpt2" and ALIASES.get(name, name) in PRE


def read_tokenizer(fields: Mapping[str, Any]) -> Any:
    """The byte-level BPE tokenizer in `fields`, all settings of a `.gguf` file by name.

    Raises whatever damaged settings lead to.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    name = own.get("pre", "default")
    rules = PRE[ALIASES.get(name, name)]
    words = own["tokens"]
    merges = [tuple(pair.split(" ")) for pair in own["merges"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignore_merges)
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(rules)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = own.get("token_type", [NORMAL] * len(words))
    tokenizer.add_tokens(
        [
            AddedToken(word, normalized=False, special=kind == CONTROL)
            for word, kind in zip(words, kinds)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": words[own[f"{long}_token_id"]]
        for long, short in named.items()
        if f"{long}_token_id" in own
    }
    _add_ends(tokenizer, own)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    found.chat_template = fields.get("tokenizer.chat_template")
    return found


def _pre_tokenizer(rules: Rules) -> Any:
    from tokenizers import Regex, pre_tokenizers

    def step(pattern: str) -> Any:
        if pattern == DIGITS:
            return pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in rules.steps)
    steps = [step(pattern) for pattern in rules.steps if pattern != GPT2]
    return pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level


def _add_ends(tokenizer: Any, own: Mapping[str, Any]) -> None:
    """Let `tokenizer` put the start and end tokens around a text that the file asks for."""
    from tokenizers import processors

    template, tokens = ["$A"], []
    for side, place in (("bos", 0), ("eos", 2)):
        number = own.get(f"{side}_token_id")
        if own.get(f"add_{side}_token") and number is not None:
            template.insert(place, own["tokens"][number])
            tokens.append((own["tokens"][number], number))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=template, special_tokens=tokens),
        ]
    )


def parsed(tokenizer: Any) -> dict[str, Any]:
    """The `tokenizer.json` of a fast tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def merged_pairs(backend: Mapping[str, Any]) -> list[list[str]]:
    """The merges of a `tokenizer.json`, parsed, in their order; older files have them as texts."""
    merges = backend["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]
