"""A tokenizer in the words of llama.cpp: tokens, their kinds, merges or scores, special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastprune.errors import InputError
from fastprune.models.gguf_words import (
    BYTE,
    BYTE_TOKEN,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merged_pairs,
    parsed,
    pre_name,
)
from fastprune.models.vocabulary import embedding_rows

SPACE = "▁"
UNMERGED = -1e6
"""Score of a token that no merge makes: below all that one does."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def words(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The settings `tokenizer.*` of the file by name.

    There is a token for every row of the embedding of `model`. Raises InputError for a tokenizer
    that llama.cpp does not know.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _refusal("has no tokenizer.json")
    backend = parsed(tokenizer)
    if backend["model"]["type"] != "BPE":
        raise _refusal(f"is of the kind {backend['model']['type']}")
    sentencepiece = bool(backend["model"].get("byte_fallback"))
    texts, kinds = _tokens(tokenizer, backend, embedding_rows(model))
    found: dict[str, Any] = {
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        **(_scores(backend, texts) if sentencepiece else _merges(backend)),
        **_special(model, tokenizer, len(texts)),
    }
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _tokens(tokenizer: Any, backend: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of the tokens 0 to `rows` - 1."""
    added = {token["id"]: token for token in backend["added_tokens"]}
    known = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(known) >= rows:
        raise InputError(
            f"the tokenizer has {max(known) + 1} tokens and the model's embedding {rows} rows; use "
            "the tokenizer that the model was trained with"
        )
    unknown = backend["model"].get("unk_token")
    texts, kinds = [], []
    for number in range(rows):
        text = known.get(number)
        if text is None:
            kind, text = UNUSED, f"[PAD{number}]"
        elif number in added:
            special = added[number]["special"]
            kind = UNKNOWN if text == unknown else CONTROL if special else USER_DEFINED
        elif backend["model"].get("byte_fallback") and BYTE_TOKEN.fullmatch(text):
            kind = BYTE
        else:
            kind = NORMAL
        texts.append(text)
        kinds.append(kind)
    return texts, kinds


def _merges(backend: Mapping[str, Any]) -> dict[str, Any]:
    """A byte-level tokenizer."""
    name = pre_name(backend)
    normalizer = backend["normalizer"] or {}
    if name is None or normalizer.get("type", "NFC") != "NFC":
        raise _refusal("cuts or normalises texts by rules that llama.cpp has no name for")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merged_pairs(backend)],
    }


def _scores(backend: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """A tokenizer in the manner of SentencePiece, which merges by the score of the result.

    The score is the rank of the first merge that makes a token, so both merge in one order.
    """
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(merged_pairs(backend)):
        rank.setdefault(left + right, position)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-rank.get(text, -UNMERGED)) for text in texts],
        "tokenizer.ggml.add_space_prefix": _adds_space(backend),
    }


def _adds_space(backend: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text. Raises InputError for other rules than for spaces."""
    normalizer, splitter = (backend[key] or {} for key in ("normalizer", "pre_tokenizer"))
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    prefix = replaced = False
    for step in [*steps, splitter]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                replaced = True
            case {"type": "Split", "pattern": {"String": " "}} if replaced:
                pass  # Gemma's: no space is left to cut at
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                prefix = prefix or step.get("prepend_scheme") in ("first", "always")
            case _ if step:
                raise _refusal("cuts or normalises texts by rules that llama.cpp has no name for")
    return prefix


def _special(model: nn.Module, tokenizer: Any, count: int) -> dict[str, Any]:
    """The tokens that start and end texts and turns, and whether texts are put between them."""
    found: dict[str, Any] = {}
    for short, long in SPECIAL.items():
        number = getattr(tokenizer, f"{short}_token_id")
        if number is not None and number < count:
            found[f"tokenizer.ggml.{long}_token_id"] = number
    ends = _ends(model)
    end = found.setdefault("tokenizer.ggml.eos_token_id", ends[0] if ends else None)
    if end is None:
        del found["tokenizer.ggml.eos_token_id"]
    if turn := next((number for number in ends if number != end), None):
        found["tokenizer.ggml.eot_token_id"] = turn
    ids = tokenizer("a")["input_ids"]
    for short, place in (("bos", 0), ("eos", -1)):
        number = found.get(f"tokenizer.ggml.{short}_token_id")
        found[f"tokenizer.ggml.add_{short}_token"] = number is not None and ids[place] == number
    return found


def _ends(model: nn.Module) -> list[int]:
    """The tokens that end what the model generates."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = settings.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _refusal(what: str) -> InputError:
    return InputError(f"the tokenizer {what}, so it cannot be in a .gguf file; export as hf")
