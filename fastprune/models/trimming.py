"""A BPE tokenizer cut to some of its tokens.

BPE cuts a text into characters and merges neighbours, the best-ranked pair first. The merges that
make a token happen inside its own characters, so a text whose tokens all stay is cut into the same
tokens as before as long as everything that is merged on the way to them stays too. A text with
tokens that go is cut into smaller ones, down to characters and bytes, which always stay.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.models.gguf_words import BYTE_TOKEN, merged_pairs, parsed
from fastprune.models.load import named_tokenizer
from fastprune.models.quiet import quiet_libraries

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
BESIDE = (FILE, CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""Files of a saved tokenizer that do not hold the vocabulary in a second form."""


class Trimmer:
    """What can go of the BPE tokenizer ``tokenizer``, and the tokenizer that is left then.

    ``ids`` are the ids of all its tokens, ascending. ``lasting`` are those that every text needs:
    single characters and bytes, added and special tokens, and what its post-processor puts around
    a text. Raises InputError for a tokenizer that is not a BPE in a tokenizer.json.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = _checked(tokenizer)
        model = backend["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merged_pairs(backend))}
        self.tokens = {number: text for text, number in tokenizer.get_vocab().items()}
        self.ids = sorted(self.tokens)
        basic = {
            number
            for text, number in self.vocabulary.items()
            if len(text) == 1
            or text == model.get("unk_token")
            or (model.get("byte_fallback") and BYTE_TOKEN.fullmatch(text))
        }
        referred = {holder[key] for holder, key in _references(backend)}
        self.lasting = frozenset(basic | referred | set(tokenizer.all_special_ids))

    def closure(self, token: int) -> frozenset[int]:
        """The ids of ``token`` and of everything that is merged on the way to it."""
        text = self.tokens[token]
        parts = list(text)
        if text not in self.vocabulary or any(part not in self.vocabulary for part in parts):
            return frozenset({token})
        made = {token, *(self.vocabulary[part] for part in parts)}
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in pairwise(parts)]
            best = min(ranks)
            if best == math.inf:  # no merges lead to it: it is matched as a whole, if at all
                return frozenset({token})
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            made.add(self.vocabulary[parts[at]])
        return frozenset(made)

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """The ids of ``tokens``, of what is merged on the way to them, and of what always stays."""
        return set(self.lasting).union(*map(self.closure, tokens))

    def fill(self, kept: set[int], order: Sequence[int], count: int) -> None:
        """Add tokens to the closed set ``kept`` until it has ``count`` of them.

        They are taken in ``order``, which holds all `ids`. A token whose closure is too large for
        what is left is passed over.
        """
        while len(kept) < min(count, len(self.ids)):
            for token in order:
                more = self.closure(token) - kept
                if len(kept) + len(more) <= count:
                    kept |= more
                if len(kept) == count:
                    break

    def trimmed(self, kept: Sequence[int]) -> Any:
        """The tokenizer of the ids ``kept``, a closed set in ascending order, which become 0, 1, ….

        Raises InputError where it does not read back from its files with just these tokens.
        """
        new = {old: number for number, old in enumerate(kept)}
        backend = parsed(self.tokenizer)
        for holder, key in _references(backend):
            holder[key] = new[holder[key]]
        model = backend["model"]
        words = {text: new[number] for text, number in self.vocabulary.items() if number in new}
        model["vocab"] = words
        model["merges"] = [
            pair for pair in merged_pairs(backend) if words.keys() >= {*pair, "".join(pair)}
        ]
        found = self._reloaded(backend)
        if found.get_vocab() != {self.tokens[old]: number for old, number in new.items()}:
            raise InputError(
                f"the tokenizer ({type(found).__name__}) numbers its tokens by other rules than "
                "its tokenizer.json, so its vocabulary cannot be trimmed; leave --vocab out"
            )
        return found

    def _reloaded(self, backend: dict[str, Any]) -> Any:
        """The tokenizer with ``backend`` as its tokenizer.json, everything else as it was."""
        with tempfile.TemporaryDirectory(prefix="fastprune-") as name:
            folder = Path(name)
            with quiet_libraries():
                self.tokenizer.save_pretrained(folder)
            for file in folder.iterdir():
                if file.is_file() and file.name not in BESIDE:
                    file.unlink()
            settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            settings.pop("added_tokens_decoder", None)  # by their ids before; FILE has the new ones
            (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
            (folder / FILE).write_text(json.dumps(backend), encoding="utf-8")
            found = named_tokenizer(folder)
        found.name_or_path = self.tokenizer.name_or_path
        return found


def _checked(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of ``tokenizer``. InputError where it is not a BPE that can be trimmed."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _refusal("has no tokenizer.json")
    backend = parsed(tokenizer)
    model = backend["model"]
    if model["type"] != "BPE":
        raise _refusal(f"is of the kind {model['type']}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal("marks the parts of words by a prefix or suffix")
    return backend


def _references(backend: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where a tokenizer.json holds the id of a token beside its vocabulary: holders and keys."""
    yield from ((token, "id") for token in backend["added_tokens"])
    if backend.get("padding"):
        yield backend["padding"], "pad_id"
    steps = [backend["post_processor"] or {}]
    for step in steps:
        steps += step.get("processors", [])
        for token in step.get("special_tokens", {}).values():
            yield from ((token["ids"], place) for place in range(len(token["ids"])))
        yield from ((step[side], 1) for side in ("sep", "cls") if side in step)


def _refusal(what: str) -> InputError:
    return InputError(
        f"the tokenizer {what}; --vocab trims byte-level BPE and BPE with byte fallback only: "
        "leave it out"
    )
