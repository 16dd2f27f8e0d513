"""Sources on the command line to records, one after the other.

A source is a path (to a file of a form in `data.files`, or a folder of them),
`hf:NAME[:CONFIG[:SPLIT]]`, a short name, or a text inside the package (`builtin:NAME`); several are
joined by commas. Files are read a piece at a time, so that a corpus may be larger than memory (a
`.json` file alone is parsed as a whole).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.data.builtin import BUILTIN, builtin_documents
from fastprune.data.files import checked_form, folder_files, is_packed, split_of
from fastprune.data.shards import TokenShard
from fastprune.errors import InputError
from fastprune.readers import parse_json, parse_json_values

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
DELIMITERS = ",;\t"  # of a .csv; the first one that its first line has


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
    held_out: bool = False
    """of another split than train, in a file that has train too"""

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
    parts = [name] if name and os.path.exists(name) else [part.strip() for part in name.split(",")]
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


def check_data(spec: str | Path) -> None:
    """InputError where a source of `spec` is missing, or a file of it is unreadable or empty.

    Only the beginning of a source is read, and none of the hub's data sets.
    """
    for name in source_names(spec):
        files = source_files(name)
        if files and next(read_source(name, broken=_pass_over), None) is None:
            raise InputError(f"{name}: no data in it")


def _pass_over(record: Record, reason: str) -> None:
    """A broken record is no reason to refuse the others."""


def source_files(name: str) -> list[Path]:
    """The files of a source, sorted; none for one that does not lie on the disk.

    Raises InputError for a name that is neither a path nor a data set, for a file of an unknown
    form, and for a folder without any of a known one.
    """
    if not name.strip():
        raise InputError("an empty name stands where a text is expected")
    path = Path(name).expanduser()
    if path.is_dir():
        return folder_files(path)
    if path.is_file():
        checked_form(path)
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
    match checked_form(path):
        case "jsonl":
            return _jsonl(path, name, broken or _refuse)
        case "json":
            return _json(path, name, broken or _refuse)
        case "parquet":
            return _parquet(path, name)
        case "arrow":
            return _arrow(path, name)
        case "csv":
            return _csv(path, name, DELIMITERS)
        case "tsv":
            return _csv(path, name, "\t")
        case "tokens":
            return iter([Record(TokenShard(path), name)])
    return _plain(path, name)


def _refuse(record: Record, reason: str) -> None:
    raise InputError(f"{record.where} {reason}")


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in pieces, with plain line ends, or those would count as tokens."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    position = 0
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as file:
            while True:
                data = file.read(READ_BYTES)
                if b"\0" in data:
                    raise InputError(f"{path}: not text (it has zero bytes); save it as UTF-8")
                yield lines.decode(data, final=not data)
                if not data:
                    return
                position += len(data)
    except UnicodeDecodeError as error:
        # `object` begins with the bytes kept back from the piece before, or lacks the BOM
        byte = position + len(data) - len(error.object) + error.start
        raise InputError(
            f"{path}: not UTF-8 text (byte {byte} is wrong); save it as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a gzip file, or damaged; copy it again") from error
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
                value = parse_json(line, halves=True)
            except ValueError as error:
                broken(Record(None, name, "line", number), f"is not JSON: {error}")
            else:
                yield Record(value, name, "line", number)


def _json(path: Path, name: str, broken: Broken) -> Iterator[Record]:
    text = _whole(path)
    try:
        values = parse_json_values(text, halves=True)
        problem = "it is empty"
    except ValueError as error:
        values, problem = [], str(error)
    if len(values) != 1 and _is_json(text.lstrip().partition("\n")[0]):  # one value a line
        yield from _jsonl(path, name, broken)
        return
    if not values:
        raise InputError(f"{path}: not JSON: {problem}")
    content = values[0] if len(values) == 1 else values
    del text
    number = 0
    for values, held_out in _contained(content):
        for value in values:
            number += 1
            yield Record(value, name, "record", number, held_out=held_out)


def _is_json(line: str) -> bool:
    try:
        parse_json(line, halves=True)
    except ValueError:
        return False
    return True


def _whole(path: Path) -> str:
    try:
        return "".join(_decoded(path))
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory; save it as .jsonl") from error


def _contained(content: Any) -> list[tuple[list[Any], bool]]:
    """The records in the content of a JSON file, and whether they are held out of training.

    A list of records; one record; lists by the name of their split; {"data": [records]}; records
    by an identifier; or columns, as lists or by the number of the row.
    """
    if not isinstance(content, dict):
        return [(content if isinstance(content, list) else [content], False)]
    values = list(content.values())
    if is_record(content) or not values:
        return [([content], False)]
    if all(isinstance(value, list) for value in values):
        splits = {key: split_of(str(key)) for key in content}
        if all(splits.values()):
            train = "train" in splits.values()
            return [(content[key], train and splits[key] != "train") for key in content]
        if len(values) > 1 and len(set(map(len, values))) == 1:
            return [([dict(zip(content, row)) for row in zip(*values)], False)]
    if all(isinstance(value, dict) for value in values):
        rows = list(values[0])
        if rows and all(list(value) == rows for value in values) and all(map(str.isdecimal, rows)):
            return [([{key: content[key][row] for key in content} for row in rows], False)]
        return [(values, False)]
    lists = [value for value in values if isinstance(value, list)]
    whole = len(lists) == 1 and (len(values) == 1 or _are_objects(lists[0]))
    return [(lists[0] if whole else [content], False)]


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def is_record(value: dict[str, Any]) -> bool:
    """Whether a JSON object is itself a conversation rather than a container of records."""
    return isinstance(value.get("messages"), list) or isinstance(value.get("conversations"), list)


def _csv(path: Path, name: str, delimiters: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in _lines(path))
    first = next(lines, "")
    delimiter = next((sign for sign in delimiters if sign in first), delimiters[0])
    rows = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter)
    try:
        for number, value in enumerate(rows, start=1):
            yield Record(value, name, "record", number)
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not CSV: {error}") from error


def _arrow(path: Path, name: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid, ipc, memory_map
    except ImportError as error:
        raise InputError(f"{path}: reading it needs pyarrow: pip install pyarrow") from error
    try:
        with memory_map(str(path)) as source:
            try:
                batches = iter(ipc.open_stream(source))
            except ArrowInvalid:  # the other of the two forms
                file = ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            yield from _rows(batches, name)
    except Exception as error:  # strings that are no text come out as Python's own errors
        raise InputError(f"{path}: not an Arrow file, or damaged; copy it again") from error


def _rows(batches: Iterable[Any], name: str) -> Iterator[Record]:
    """The rows of Arrow's record batches."""
    pieces = itertools.chain.from_iterable(_pieces(batch) for batch in batches)
    values = itertools.chain.from_iterable(piece.to_pylist() for piece in pieces)
    for number, value in enumerate(values, start=1):
        yield Record(value, name, "record", number)


def _pieces(batch: Any) -> Iterator[Any]:
    return (batch.slice(at, PARQUET_ROWS) for at in range(0, batch.num_rows, PARQUET_ROWS))


def _parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading it needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        yield from _rows(file.iter_batches(batch_size=PARQUET_ROWS), name)
    except Exception as error:  # strings that are no text come out as Python's own errors
        raise InputError(f"{path}: not a Parquet file, or damaged; copy it again") from error


def hub_parts(spec: str) -> tuple[str, str, str]:
    """Name, configuration (empty where none is given) and split of a hub data set."""
    full = SHORT_NAMES.get(spec, spec)
    name, config, split = (*full.removeprefix("hf:").split(":"), "", "")[:3]
    return name, config, split or "train"


def _hub(spec: str, rows: int) -> Iterator[Record]:
    name, config, split = hub_parts(spec)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"text {spec!r} comes from the hub and needs the package datasets: "
            f"pip install 'fastprune[train]'; or give a local file, or {', '.join(BUILTIN)}"
        ) from error
    source: dict[str, Any] = {"path": name, "name": config or None, "split": split}
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
