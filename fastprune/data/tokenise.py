"""Sources to token stores, once: the work behind `data.training`.

Everything is kept whole here, not cut to a sequence length, so that the stages of a recipe that
differ in it share one copy. It is read from the cache as long as the content of the files, the
tokenizer and its chat template stay what they were.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastprune.data.cache import (
    LAYOUT,
    SHARD_TOKENS,
    Store,
    StoreWriter,
    files_digest,
    tokenizer_digest,
)
from fastprune.data.checks import Finding, Findings, Unusable, encoding_problems
from fastprune.data.examples import Example, detect_kind, example_of, text_of
from fastprune.data.instruct import (
    Rendered,
    chat_messages,
    document_end,
    is_marked,
    render,
    source_text,
)
from fastprune.data.records import (
    Broken,
    Record,
    read_file,
    read_source,
    source_files,
    source_names,
)
from fastprune.errors import InputError
from fastprune.models.foreign import cached_folder
from fastprune.progress import track

HUB_ROWS = 200_000
"""Rows taken of a hub data set for training; instruction sets have fewer, c4 has far more."""
DETECTION_RECORDS = 100  # the kind of a source is that of most of its first records
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 1 << 20  # what the tokenizer is given at a time
MAX_REMEMBERED = 10_000_000  # records looked up for duplicates: about 1 GB of memory

Encoded = tuple[Record, np.ndarray, "np.ndarray | None"]

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Source:
    """A source whose records lie on the disk, or in this program."""

    name: str
    files: tuple[Path, ...]
    called: str | None
    """what positions call the file, where its own name says nothing"""

    def records(self, broken: Broken | None = None) -> Iterator[Record]:
        if not self.files:
            return read_source(self.name)
        return itertools.chain.from_iterable(
            read_file(file, name=self.called, broken=broken) for file in self.files
        )

    def digest(self) -> str:
        if self.files:
            return files_digest(self.files)
        digest = hashlib.sha256()
        for record in self.records():
            digest.update(record.value.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """The tokens of one source."""

    name: str
    kind: str
    records: int
    store: Store


@dataclass(frozen=True)
class Corpus:
    """The tokens of all sources, and what was found on the way."""

    parts: list[Part]
    findings: list[Finding]


def tokenised(
    spec: str | Path, tokenizer: Any, *, kind: str, seq2seq: bool, cache: Path | None
) -> Corpus:
    """The corpus that `spec` names, from the cache or put there now.

    `cache` is a folder; None means the user's cache directory. Raises InputError for sources that
    cannot be read or hold nothing to train on.
    """
    sources = [_resolved(name, cache) for name in source_names(spec)]
    key = [LAYOUT, kind, seq2seq, tokenizer_digest(tokenizer)]
    key += [part for source in sources for part in (source.name, source.digest())]
    name = f"tokens-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
    folder = cached_folder(
        name, lambda work: _write(work, sources, _Encoder(tokenizer, seq2seq), kind), cache
    )
    content = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return Corpus(
        [Part(**part, store=Store(folder / str(n))) for n, part in enumerate(content["parts"])],
        [Finding(**finding) for finding in content["findings"]],
    )


def _resolved(name: str, cache: Path | None) -> Source:
    if files := source_files(name):
        return Source(name, tuple(files), None)
    if name.startswith("builtin:"):
        return Source(name, (), None)

    def fetch(folder: Path) -> None:
        count = 0
        with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
            for record in track(read_source(name, rows=HUB_ROWS), f"fetching {name}"):
                file.write(json.dumps(record.value, default=str) + "\n")
                count += 1
        if count == HUB_ROWS:
            log.warning("%s: only its first %d rows are used", name, HUB_ROWS)

    key = hashlib.sha256(f"{LAYOUT} {HUB_ROWS} {name}".encode()).hexdigest()[:32]
    return Source(name, (cached_folder(f"hub-{key}", fetch, cache) / "records.jsonl",), name)


def _write(folder: Path, sources: list[Source], encoder: _Encoder, kind: str) -> None:
    findings = Findings()
    seen: set[int] = set()
    parts = []
    for number, source in enumerate(sources):
        reader = _Reader(source, kind, findings, seen)
        if encoder.seq2seq and reader.kind == "text":
            raise InputError(
                f"{source.name}: plain text; an encoder–decoder model learns from prompts with "
                "responses"
            )
        with StoreWriter(
            folder / str(number),
            vocabulary=1 + max(encoder.tokenizer.get_vocab().values()),
            masked=reader.kind != "text",
            shard_tokens=SHARD_TOKENS[reader.kind],
        ) as writer:
            kept = 0
            batches = _batches(reader)
            for batch in track(batches, f"tokenising {source.name}"):
                for record, ids, learnt in encoder.encode(batch, reader.kind, findings):
                    writer.add(ids, learnt, record)
                    kept += not record.more
        if not kept:
            reasons = "; ".join(map(str, findings)) or "it is empty"
            raise InputError(f"{source.name}: no text in it that can be trained on: {reasons}")
        parts.append({"name": source.name, "kind": reader.kind, "records": reader.records})
    content = {"parts": parts, "findings": [vars(finding) for finding in findings]}
    (folder / "corpus.json").write_text(json.dumps(content), encoding="utf-8")


class _Reader:
    """The usable records of a source as text or examples; notes what is wrong with the others."""

    def __init__(self, source: Source, kind: str, findings: Findings, seen: set[int]) -> None:
        self.source = source
        self.findings = findings
        self.seen = seen
        self.records = 0
        """how many there were, usable or not"""
        first = itertools.islice(source.records(lambda *_: None), DETECTION_RECORDS)
        try:
            self.kind = detect_kind(first) if kind == "auto" else kind
        except InputError as error:
            raise InputError(f"{source.name}: no text in it: {error}") from error

    def __iter__(self) -> Iterator[tuple[Record, str | Example]]:
        first = True  # of a document in pieces
        for record in self.source.records(self._broken):
            self.records += not record.more
            try:
                content = self._content(record, first)
            except Unusable as problem:
                self.findings.add(str(problem), record.where)
            else:
                yield record, content
            first = not record.more

    def _broken(self, record: Record, reason: str) -> None:
        self.records += 1
        self.findings.add("not json", record.where)

    def _content(self, record: Record, first: bool) -> str | Example:
        """What `record` holds. Raises Unusable."""
        content: str | Example
        if self.kind == "text":
            content = text_of(record.value)
            texts: tuple[str, ...] = (content,)
        else:
            content = example_of(record.value, self.kind)
            texts = content.texts
        problems = encoding_problems("\n".join(texts))
        if first and not record.more:
            if self.kind == "text" and not texts[0].strip():
                raise Unusable("empty text")
            self._refuse_duplicate(texts)
        for problem in problems:
            self.findings.add(problem, record.where)
        return content

    def _refuse_duplicate(self, texts: tuple[str, ...]) -> None:
        content = json.dumps(texts, ensure_ascii=False).encode()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        if digest in self.seen:
            raise Unusable("duplicate")
        if len(self.seen) < MAX_REMEMBERED:
            self.seen.add(digest)


def _batches(
    items: Iterable[tuple[Record, str | Example]],
) -> Iterator[list[tuple[Record, str | Example]]]:
    batch: list[tuple[Record, str | Example]] = []
    characters = 0
    for record, content in items:
        batch.append((record, content))
        characters += sum(map(len, (content,) if isinstance(content, str) else content.texts))
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Encoder:
    """Text and examples to token ids, with a mask of those that are learnt."""

    def __init__(self, tokenizer: Any, seq2seq: bool) -> None:
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self._inside = False  # a document whose beginning was in an earlier piece

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        return _affixes(self.tokenizer)

    def encode(
        self, batch: list[tuple[Record, Any]], kind: str, findings: Findings
    ) -> Iterator[Encoded]:
        """The records of `batch` as (record, ids (n,), learnt (n,)); learnt None if all are."""
        prefix, suffix = self._affixes
        if kind == "text":
            yield from self._texts(batch, prefix)
            return
        encode: Callable[..., Iterator[Encoded]] = self._rendered
        if self.seq2seq:
            encode = self._pairs
            suffix = suffix or _known(self.tokenizer.eos_token_id)
        elif is_marked(self.tokenizer) and self.tokenizer.is_fast:
            encode = self._marked
        for record, ids, learnt in encode(batch, prefix, suffix, findings):
            if learnt is not None and learnt.any():
                yield record, ids, learnt
            else:
                findings.add("all masked", record.where)

    def _texts(self, batch: list[tuple[Record, str]], prefix: list[int]) -> Iterator[Encoded]:
        end = _known(document_end(self.tokenizer))
        for (record, _), ids in zip(batch, self._ids([text for _, text in batch])):
            whole = [*([] if self._inside else prefix), *ids, *([] if record.more else end)]
            self._inside = record.more
            yield record, np.asarray(whole, dtype=np.int64), None

    def _pairs(
        self, batch: list[tuple[Record, Example]], prefix: list[int], suffix: list[int], _: Any
    ) -> Iterator[Encoded]:
        sources = self._ids([source_text(example) for _, example in batch])
        targets = self._ids([example.messages[-1]["content"] for _, example in batch])
        for (record, _example), source, target in zip(batch, sources, targets):
            halves = [[*prefix, *half, *suffix] for half in (source, target)]
            learnt = np.repeat([False, True], [len(half) for half in halves])
            yield record, np.asarray(halves[0] + halves[1], dtype=np.int64), learnt

    def _marked(
        self,
        batch: list[tuple[Record, Example]],
        prefix: list[int],
        suffix: list[int],
        findings: Findings,
    ) -> Iterator[Encoded]:
        """By the marks that the chat template puts around what the assistant generates."""
        for record, example in batch:
            try:
                render(self.tokenizer, example)  # says whether the template takes it
            except Unusable as problem:
                findings.add(str(problem), record.where)
                continue
            encoded = self.tokenizer.apply_chat_template(
                chat_messages(example.messages, example.context),
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            learnt = np.asarray(encoded["assistant_masks"], dtype=bool)
            yield record, np.asarray(encoded["input_ids"], dtype=np.int64), learnt

    def _rendered(
        self,
        batch: list[tuple[Record, Example]],
        prefix: list[int],
        suffix: list[int],
        findings: Findings,
    ) -> Iterator[Encoded]:
        """By the spans of the text that hold answers."""
        rendered: list[tuple[Record, Rendered]] = []
        for record, example in batch:
            try:
                rendered.append((record, render(self.tokenizer, example)))
            except Unusable as problem:
                findings.add(str(problem), record.where)
                continue
            if rendered[-1][1].problem:
                findings.add(rendered[-1][1].problem, record.where)
        masked = self._by_offsets if self.tokenizer.is_fast else self._by_pieces
        for (record, text), (ids, learnt) in zip(rendered, masked([r for _, r in rendered])):
            before = prefix if text.special else []
            yield (
                record,
                np.concatenate([np.asarray(before, dtype=np.int64), ids]),
                np.concatenate([np.zeros(len(before), dtype=bool), learnt]),
            )

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


def _affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What `tokenizer` puts before and after a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []
