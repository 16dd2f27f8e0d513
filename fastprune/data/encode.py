"""Text and examples to token ids, with a mask of those that are learnt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fastprune.data.checks import Findings, Unusable
from fastprune.data.examples import Example, Message
from fastprune.data.instruct import (
    Rendered,
    apply_template,
    chat_messages,
    document_end,
    is_marked,
    prompt_text,
    render,
    source_of,
    source_text,
    with_template,
)
from fastprune.data.records import Record
from fastprune.data.wording import affixes

Encoded = tuple[Record, np.ndarray, "np.ndarray | None"]


class Encoder:
    """Text and examples to token ids, with a mask of those that are learnt."""

    def __init__(self, tokenizer: Any, seq2seq: bool) -> None:
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self._inside = False  # a document whose beginning was in an earlier piece

    @cached_property
    def _asking(self) -> Any:
        """The tokenizer with the template that conversations are put by."""
        return with_template(self.tokenizer)

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        return affixes(self.tokenizer)

    def encode(
        self, batch: list[tuple[Record, Any]], kind: str, findings: Findings
    ) -> Iterator[Encoded]:
        """The records of `batch` as (record, ids (n,), learnt (n,)); learnt None if all are.

        Records of which nothing can be learnt are left out, and noted in `findings`.
        """
        if kind == "text":
            yield from self._texts(batch)
            return
        if self.seq2seq:
            encoded = self._pairs(batch)
        elif is_marked(self._asking) and self.tokenizer.is_fast:
            encoded = self._marked(batch, findings)
        else:
            encoded = self._rendered(batch, findings)
        for record, ids, learnt in encoded:
            if learnt is not None and learnt.any():
                yield record, ids, learnt
            else:
                findings.add("all masked", record.where)

    def prompt(self, text: str, kind: str) -> str | list[int]:
        """What to give a model to answer `text`, as it was taught by data of this `kind`.

        The token ids up to where an answer begins; `text` itself after plain text, and for an
        encoder–decoder model, which reads bare prompts.
        """
        asked = {"role": "user", "content": text}
        return text if kind == "text" else self.conversation([asked])

    def conversation(self, messages: Sequence[Message]) -> str | list[int]:
        """What to give a model to answer the last of `messages`: token ids, or the text that an
        encoder–decoder model reads. Raises InputError where the chat template refuses them."""
        if self.seq2seq:
            return source_of(messages)
        return self._ids([prompt_text(self._asking, messages)])[0]

    def _texts(self, batch: list[tuple[Record, str]]) -> Iterator[Encoded]:
        prefix, _ = self._affixes
        end = _known(document_end(self.tokenizer))
        for (record, _), ids in zip(batch, self._ids([text for _, text in batch])):
            whole = [*([] if self._inside else prefix), *ids, *([] if record.more else end)]
            self._inside = record.more
            yield record, np.asarray(whole, dtype=np.int64), None

    def _pairs(self, batch: list[tuple[Record, Example]]) -> Iterator[Encoded]:
        """What the encoder reads, and after it, learnt, what the decoder says."""
        prefix, suffix = self._affixes
        suffix = suffix or _known(self.tokenizer.eos_token_id)
        sources = self._ids([source_text(example) for _, example in batch])
        targets = self._ids([example.messages[-1]["content"] for _, example in batch])
        for (record, _), source, target in zip(batch, sources, targets):
            halves = [[*prefix, *half, *suffix] for half in (source, target)]
            learnt = np.repeat([False, True], [len(half) for half in halves])
            yield record, np.asarray(halves[0] + halves[1], dtype=np.int64), learnt

    def _marked(self, batch: list[tuple[Record, Example]], findings: Findings) -> Iterator[Encoded]:
        """By the marks that the chat template puts around what the assistant generates."""
        for record, example in batch:
            try:
                encoded = apply_template(
                    self._asking,
                    chat_messages(self._asking, example.messages, example.context),
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                )
            except Unusable as problem:
                findings.add(str(problem), record.where, reason=problem.reason)
                continue
            learnt = np.asarray(encoded["assistant_masks"], dtype=bool)
            yield record, np.asarray(encoded["input_ids"], dtype=np.int64), learnt

    def _rendered(
        self, batch: list[tuple[Record, Example]], findings: Findings
    ) -> Iterator[Encoded]:
        """By the spans of the text that hold answers."""
        rendered: list[tuple[Record, Rendered]] = []
        for record, example in batch:
            try:
                rendered.append((record, render(self._asking, example)))
            except Unusable as problem:
                findings.add(str(problem), record.where, reason=problem.reason)
                continue
            if rendered[-1][1].problem:
                findings.add(rendered[-1][1].problem, record.where)
        masked = self._by_offsets if self.tokenizer.is_fast else self._by_pieces
        for (record, _), (ids, learnt) in zip(rendered, masked([text for _, text in rendered])):
            yield record, ids, learnt

    def _by_offsets(self, texts: list[Rendered]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not texts:
            return
        encoded = self.tokenizer(
            [rendered.text for rendered in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for rendered, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"]):
            starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
            learnt = np.zeros(len(ids), dtype=bool)
            for start, end in rendered.spans:
                learnt |= (ends > start) & (starts < end)
            yield np.asarray(ids, dtype=np.int64), learnt

    def _by_pieces(self, texts: list[Rendered]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each piece on its own, for tokenizers that do not say where a token lies in the text."""
        for rendered in texts:
            cuts = [0, *itertools.chain.from_iterable(rendered.spans), len(rendered.text)]
            pieces = self._ids([rendered.text[a:b] for a, b in itertools.pairwise(cuts)])
            ids = np.asarray(list(itertools.chain.from_iterable(pieces)), dtype=np.int64)
            learnt = [bool(number % 2) for number in range(len(pieces))]
            yield ids, np.repeat(learnt, [len(piece) for piece in pieces])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]


def _known(token: int | None) -> list[int]:
    return [] if token is None else [token]
