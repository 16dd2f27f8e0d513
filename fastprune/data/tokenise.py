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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from fastprune.data.columns import Columns
from fastprune.data.encode import Encoder
from fastprune.data.examples import Example, detect_kind, example_of, text_of
from fastprune.data.files import form_of, without_held_out
from fastprune.data.records import (
    Broken,
    Record,
    read_file,
    read_source,
    source_files,
    source_names,
)
from fastprune.data.shards import TokenShard
from fastprune.errors import InputError
from fastprune.models.foreign import cached_folder
from fastprune.progress import track

HUB_ROWS = 200_000
"""Rows taken of a hub data set for training; instruction sets have fewer, c4 has far more."""
DETECTION_RECORDS = 100  # the kind of a source is that of most of its first records
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 1 << 20  # what the tokenizer is given at a time
MAX_REMEMBERED = 10_000_000  # records looked up for duplicates: about 1 GB of memory

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Source:
    """A source whose records lie on the disk, or in this program."""

    name: str
    files: tuple[Path, ...]
    called: str | None = None
    """what positions call the file, where its own name says nothing"""
    held_out: tuple[Path, ...] = ()
    """files of other splits than train, which are left alone"""

    @property
    def of_tokens(self) -> bool:
        """Whether its files hold token ids."""
        return bool(self.files) and form_of(self.files[0]) == "tokens"

    def records(self, broken: Broken | None = None) -> Iterator[Record]:
        if not self.files:
            return read_source(self.name)
        return itertools.chain.from_iterable(
            read_file(file, name=self.called, broken=broken) for file in self.files
        )

    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

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
    largest: int
    """the greatest token id in it"""
    source: Source
    store: Store


@dataclass(frozen=True)
class Corpus:
    """The tokens of all sources, and what was found on the way."""

    parts: list[Part]
    findings: list[Finding]


def tokenised(
    spec: str | Path, tokenizer: Any, *, kind: str | Columns, seq2seq: bool, cache: Path | None
) -> Corpus:
    """The corpus that `spec` names, from the cache or put there now.

    `kind` is that of all records, auto, or the columns of what they hold. `cache` is a folder; None
    means the user's cache directory. Raises InputError for sources that
    cannot be read or hold nothing to train on.
    """
    sources = [_resolved(name, cache) for name in source_names(spec)]
    columns = kind.fields if isinstance(kind, Columns) else kind
    key = [LAYOUT, columns, seq2seq, tokenizer_digest(tokenizer)]
    key += [part for source in sources for part in (source.name, source.digest())]
    name = f"tokens-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
    folder = cached_folder(
        name,
        lambda work: _write(work, sources, Encoder(tokenizer, seq2seq), kind),
        cache,
        size=sum(source.size() for source in sources),  # of text about what its tokens take
    )
    content = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return Corpus(
        [
            Part(**part, source=source, store=Store(folder / str(n)))
            for n, (part, source) in enumerate(zip(content["parts"], sources))
        ],
        [Finding(**finding) for finding in content["findings"]],
    )


def _resolved(name: str, cache: Path | None) -> Source:
    if files := source_files(name):
        path = Path(name).expanduser()
        kept, held_out = without_held_out(path, files) if path.is_dir() else (files, [])
        return Source(name, tuple(kept), held_out=tuple(held_out))
    if name.startswith("builtin:"):
        return Source(name, ())

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


def _write(folder: Path, sources: list[Source], encoder: Encoder, kind: str | Columns) -> None:
    findings = Findings()
    seen: set[int] = set()
    parts = []
    for number, source in enumerate(sources):
        if source.of_tokens:
            parts.append(_copy_tokens(folder / str(number), source, encoder, kind))
            continue
        reader = _Reader(source, kind, findings, seen)
        if encoder.seq2seq and reader.kind == "text":
            raise InputError(
                f"{source.name}: plain text, and an encoder–decoder model learns from prompts with "
                "responses; give such data"
            )
        with StoreWriter(
            folder / str(number),
            vocabulary=1 + max(encoder.tokenizer.get_vocab().values()),
            masked=reader.kind != "text",
            shard_tokens=SHARD_TOKENS[reader.kind],
        ) as writer:
            kept, largest = 0, 0
            batches = _batches(reader)
            for batch in track(batches, f"tokenising {source.name}"):
                for record, ids, learnt in encoder.encode(batch, reader.kind, findings):
                    writer.add(ids, learnt, record)
                    kept += not record.more
                    largest = max(largest, int(ids.max(initial=0)))
        if not kept:
            reasons = "; ".join(map(str, findings)) or "it is empty"
            raise InputError(f"{source.name}: no text in it that can be trained on: {reasons}")
        about = {"kind": reader.kind, "records": reader.records, "largest": largest}
        parts.append({"name": source.name, **about})
    content = {"parts": parts, "findings": [vars(finding) for finding in findings]}
    (folder / "corpus.json").write_text(json.dumps(content), encoding="utf-8")


def _copy_tokens(
    folder: Path, source: Source, encoder: Encoder, kind: str | Columns
) -> dict[str, Any]:
    """Token ids that are there already, into the store `folder`; what is said of the part."""
    if encoder.seq2seq or kind not in ("auto", "text"):
        raise InputError(
            f"{source.name}: token ids of a text, in which no prompts and answers are marked; give "
            "the data itself"
        )
    tokenizer, largest = encoder.tokenizer, 0
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    with StoreWriter(
        folder, vocabulary=vocabulary, masked=False, shard_tokens=SHARD_TOKENS["text"]
    ) as writer:
        for file in track(source.files, f"reading {source.name}"):
            for ids, more in _with_more(TokenShard(file).pieces(tokenizer)):
                writer.add(ids, None, Record(None, str(file), more=more))
                largest = max(largest, int(ids.max()))
    count = len(source.files)
    return {"name": source.name, "kind": "text", "records": count, "largest": largest}


def _with_more(pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each of `pieces`, and whether another follows."""
    waiting = None
    for piece in pieces:
        if waiting is not None:
            yield waiting, True
        waiting = piece
    if waiting is not None:
        yield waiting, False


class _Reader:
    """The usable records of a source as text or examples; notes what is wrong with the others."""

    def __init__(
        self, source: Source, kind: str | Columns, findings: Findings, seen: set[int]
    ) -> None:
        self.source = source
        self.findings = findings
        self.seen = seen
        self.records = 0
        """how many there were, usable or not"""
        unread: list[str] = []
        records = source.records(lambda record, why: unread.append(f"{record.where} {why}"))
        first = itertools.islice(records, DETECTION_RECORDS)
        self.columns = kind if isinstance(kind, Columns) else None
        if isinstance(kind, Columns):
            for record in itertools.islice(first, 1):
                kind.check_first(record.value, record.where)
            self.kind = kind.kind
        else:
            self.kind = detect_kind(first, source.name, unread) if kind == "auto" else kind

    def __iter__(self) -> Iterator[tuple[Record, str | Example]]:
        first = True  # of a document in pieces
        for record in self.source.records(self._broken):
            self.records += not record.more
            try:
                content = self._content(record, first)
            except Unusable as problem:
                self.findings.add(str(problem), record.where, reason=problem.reason)
            else:
                yield record, content
            first = not record.more

    def _broken(self, record: Record, reason: str) -> None:
        self.records += 1
        self.findings.add("not json", record.where)

    def _content(self, record: Record, first: bool) -> str | Example:
        """What `record` holds. Raises Unusable."""
        if record.held_out:
            raise Unusable("other split")
        value = self.columns.of(record.value) if self.columns else record.value
        content: str | Example
        if self.kind == "text":
            content = text_of(value)
            texts: tuple[str, ...] = (content,)
        else:
            content = example_of(value, self.kind)
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
