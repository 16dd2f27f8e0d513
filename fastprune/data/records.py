"""Sources on the command line to records, one after the other.

A source is a path (`.txt .jsonl .json .parquet .csv`, or a folder of them),
`hf:NAME[:CONFIG[:SPLIT]]`, a short name, or a text inside the package (`builtin:NAME`); several are
joined by commas. Files are read a piece at a time, so that a corpus may be larger than memory (a
`.json` file alone is parsed as a whole).
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.data.builtin import BUILTIN, builtin_documents
from fastprune.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
SELF = "self"
"""In place of a source: text that the model writes itself, which `prune` alone calibrates on."""
SHORT_NAMES = {
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test",
    "ptb": "hf:ptb-text-only/ptb_text_only:penn_treebank:test",
    "c4": "hf:allenai/c4:en:validation",
    "alpaca-cleaned": "hf:yahma/alpaca-cleaned::train",
    "dolly-15k": "hf:databricks/databricks-dolly-15k::train",
}
SCRIPTED = ("ptb-text-only/ptb_text_only",)
"""Data sets whose own form is a script, which datasets 4 no longer runs: the hub's copy is read."""
MAX_STREAMED_ROWS = 20_000
"""Rows taken of a hub data set: c4 alone has hundreds of millions."""
READ_BYTES = 1 << 20
PARQUET_ROWS = 1024  # at a time: a row may be a whole book


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a source: a string, or an object with named fields."""

    value: Any
    source: str
    """the file, or the name of the source"""
    unit: str = ""
    """what `number` counts in it; empty where the source is a single document"""
    number: int = 0
    """from 1"""
    more: bool = False
    """the document goes on in the next record"""

    @property
    def where(self) -> str:
        return place(self.source, self.unit, self.number)


Broken = Callable[[Record, str], None]
"""Told of a record that cannot be read, and why; whatever follows is still read."""


def place(source: str, unit: str, number: int) -> str:
    """A position as people read it: `data.jsonl: line 3`."""
    return f"{source}: {unit} {number}" if unit else source


def source_names(spec: str | Path) -> list[str]:
    """The sources that `spec` joins by commas; one named twice counts once."""
    name = str(spec)
    parts = [name] if name and Path(name).exists() else [part.strip() for part in name.split(",")]
    return list(dict.fromkeys(parts))


def read_source(
    name: str, *, rows: int = MAX_STREAMED_ROWS, broken: Broken | None = None
) -> Iterator[Record]:
    """The records of one source, at most `rows` of a hub data set.

    Raises InputError for a source that is missing, unreadable or binary, and, unless `broken` is
    there to be told, for a line that cannot be parsed.
    """
    if name in BUILTIN:
        for number, document in enumerate(builtin_documents(name), start=1):
            yield Record(document, name, "document", number)
    elif files := source_files(name):
        for file in files:
            yield from read_file(file, broken=broken)
    else:
        yield from _hub(name, rows)


def source_files(name: str) -> list[Path]:
    """The files of a source, sorted; none for one that does not lie on the disk.

    Raises InputError for a name that is neither a path nor a data set.
    """
    if not name.strip():
        raise InputError("an empty name stands where a text is expected")
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise InputError(f"{path}: no {' '.join(SUFFIXES)} files in this folder")
        return files
    if path.is_file():
        return [path]
    if name in BUILTIN or name in SHORT_NAMES or name.startswith("hf:"):
        return []
    if name == SELF:
        raise InputError(
            f"text {SELF!r}: only `prune --calib` can let the model write its text; name another"
        )
    raise InputError(
        f"text {name!r}: no such file or folder; give a path, hf:NAME[:CONFIG[:SPLIT]], "
        f"or one of {', '.join((*BUILTIN, *SHORT_NAMES))}"
    )


def read_file(
    path: Path, *, name: str | None = None, broken: Broken | None = None
) -> Iterator[Record]:
    """The records of one file; positions call it `name`. Raises InputError as `read_source`."""
    name = name or str(path)
    match path.suffix:
        case ".jsonl":
            return _jsonl(path, name, broken or _refuse)
        case ".json":
            return _json(path, name, broken or _refuse)
        case ".parquet":
            return _parquet(path, name)
        case ".csv":
            return _csv(path, name)
    return _plain(path, name)


def _refuse(record: Record, reason: str) -> None:
    raise InputError(f"{record.where} {reason}")


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in pieces, with plain line ends, or those would count as tokens."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    position = 0
    try:
        with path.open("rb") as file:
            while True:
                data = file.read(READ_BYTES)
                if b"\0" in data:
                    raise InputError(f"{path}: not text (it has zero bytes)")
                yield lines.decode(data, final=not data)
                if not data:
                    return
                position += len(data)
    except UnicodeDecodeError as error:
        # `object` begins with the bytes kept back from the piece before, or lacks the BOM
        byte = position + len(data) - len(error.object) + error.start
        raise InputError(f"{path}: not UTF-8 text (byte {byte} is wrong)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path) -> Iterator[str]:
    rest = ""
    for piece in _decoded(path):
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def _plain(path: Path, name: str) -> Iterator[Record]:
    """One document, in pieces that end where a paragraph does, if there is one."""
    rest = ""
    for piece in _decoded(path):
        text = rest + piece
        # a space belongs to the word after it
        ends = (("\n\n", 2), ("\n", 1), (" ", 0))
        cut = next((at + keep for end, keep in ends if (at := text.rfind(end)) > 0), 0)
        rest = text[cut:]
        if cut and rest:
            yield Record(text[:cut], name, more=True)
        else:  # nothing follows yet: the last piece of all must not be empty
            rest = text
    yield Record(rest, name)


def _jsonl(path: Path, name: str, broken: Broken) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                broken(Record(None, name, "line", number), f"is not JSON: {error}")
            else:
                yield Record(value, name, "line", number)


def _json(path: Path, name: str, broken: Broken) -> Iterator[Record]:
    text = "".join(_decoded(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # one object a line, which many a .json file is
            yield from _jsonl(path, name, broken)
            return
        raise InputError(f"{path}: not JSON: {error}") from error
    del text
    if isinstance(content, dict):  # one record, or {"data": [records]}
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 and not is_record(content) else [content]
    values = content if isinstance(content, list) else [content]
    for number, value in enumerate(values, start=1):
        yield Record(value, name, "record", number)


def is_record(value: dict[str, Any]) -> bool:
    """Whether a JSON object is itself a conversation rather than a container of records."""
    return isinstance(value.get("messages"), list) or isinstance(value.get("conversations"), list)


def _csv(path: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(line + "\n" for line in _lines(path))
    try:
        for number, value in enumerate(rows, start=1):
            yield Record(value, name, "record", number)
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not CSV: {error}") from error


def _parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path}: reading it needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        batches = file.iter_batches(batch_size=PARQUET_ROWS)
        values = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, value in enumerate(values, start=1):
            yield Record(value, name, "record", number)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file, or damaged") from error


def _hub(spec: str, rows: int) -> Iterator[Record]:
    full = SHORT_NAMES.get(spec, spec)
    name, config, split = (*full.removeprefix("hf:").split(":"), "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"text {spec!r} comes from the hub and needs the package datasets: "
            f"pip install datasets; or give a local file, or {', '.join(BUILTIN)}"
        ) from error
    source: dict[str, Any] = {"path": name, "name": config or None, "split": split or "train"}
    if name in SCRIPTED:
        copy = f"hf://datasets/{name}@refs/convert/parquet/{config}/{split}/*.parquet"
        source = {"path": "parquet", "data_files": copy, "split": "train"}
    try:
        found = load_dataset(**source, streaming=True)
        for number, value in enumerate(found.take(rows), start=1):
            yield Record(value, spec, "record", number)
    except Exception as error:  # the hub client raises errors of four libraries
        raise InputError(
            f"text {spec!r} could not be fetched from the hub ({type(error).__name__}); "
            f"check the name and the network, or give a local file, or {', '.join(BUILTIN)}"
        ) from error
