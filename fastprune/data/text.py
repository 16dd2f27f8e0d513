"""TEXT on the command line to token windows.

TEXT is a path (`.txt .jsonl .json .parquet .csv`, or a folder of them), `hf:NAME[:CONFIG[:SPLIT]]`,
a short name, `builtin:pydocs`, or several of these joined by commas. Every figure that depends on a
text says in which windows it was read, so the text is one stream: documents joined by a blank line.

Windows from the start read several sources one after the other; windows drawn by a seed
(`sample_mix`) come in equal shares from all of them, whatever their lengths.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
BUILTIN = "builtin:pydocs"
SHORT_NAMES = {
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test",
    "ptb": "hf:ptb-text-only/ptb_text_only:penn_treebank:test",
    "c4": "hf:allenai/c4:en:validation",
    "alpaca-cleaned": "hf:yahma/alpaca-cleaned::train",
    "dolly-15k": "hf:databricks/databricks-dolly-15k::train",
}
SCRIPTED = ("ptb-text-only/ptb_text_only",)
"""Data sets whose own form is a script, which datasets 4 no longer runs: the hub's copy is read."""
CHARACTERS_PER_TOKEN = 6  # more than English takes, so that one try is enough
EDGE_TOKENS = 64  # the last tokens before a cut may differ from those of the whole text
MAX_STREAMED_ROWS = 20_000
"""Rows taken of a hub data set: c4 alone has hundreds of millions."""

TEXT_FIELDS = ("text", "content", "sentence", "document")
"""Fields that hold a whole document, in the order they are looked for."""
PART_FIELDS = (
    ("instruction", "prompt", "question"),
    ("input", "context"),
    ("output", "response", "answer", "completion"),
)
"""Fields of an instruction record; those it has are joined in this order."""

log = logging.getLogger("fastprune")


def load_documents(spec: str | Path) -> list[str]:
    """The documents that `spec` names, none of them blank, in the order of the sources.

    Raises InputError for a source that is missing, unreadable, binary, or empty.
    """
    return [text for documents in load_sources(spec).values() for text in documents]


def load_sources(spec: str | Path) -> dict[str, list[str]]:
    """The documents of each source that `spec` names, by its name; one named twice counts once.

    Raises InputError for a source that is missing, unreadable, binary, or empty.
    """
    name = str(spec)
    parts = [name] if name and Path(name).exists() else [part.strip() for part in name.split(",")]
    sources: dict[str, list[str]] = {}
    for part in dict.fromkeys(parts):
        sources[part] = [text for text in _source(part) if text.strip()]
        if not sources[part]:
            raise InputError(f"{part}: no text in it")
    return sources


def token_stream(tokenizer: Any, documents: Iterable[str], limit: int | None = None) -> Tensor:
    """All documents, joined by a blank line, as one stream of token ids (tokens,), int64.

    No special tokens are added. `limit` stops after that many tokens; they are the first ones of
    the whole stream, found without tokenising much more of the text than they cover.
    """
    text = "\n\n".join(documents)
    size = len(text) if limit is None else limit * CHARACTERS_PER_TOKEN
    while limit is not None and size < len(text):
        tokens = _tokenise(tokenizer, text[:size])
        whole = tokens[:-EDGE_TOKENS]
        if len(whole) >= limit:
            return whole[:limit]
        size *= 2
    return _tokenise(tokenizer, text)[:limit]


def eval_windows(stream: Tensor, seq_len: int, windows: int | None = None) -> Tensor:
    """The first non-overlapping windows (n, seq_len) of `stream`, n = min(windows, all there are).

    `windows` None takes all. Raises InputError when the text is shorter than one window.
    """
    if windows is not None and windows < 1:
        raise InputError(f"windows must be at least 1, got {windows}")
    available = len(stream) // _checked(seq_len)
    if available == 0:
        raise InputError(
            f"the text has {len(stream)} tokens, fewer than one window of {seq_len}; "
            "use a longer text or a smaller sequence length"
        )
    n = available if windows is None else min(windows, available)
    if windows is not None and n < windows:
        log.warning("the text has only %d windows of %d tokens, not %d", n, seq_len, windows)
    return stream[: n * seq_len].view(n, seq_len)


def sample_windows(stream: Tensor, seq_len: int, n: int, seed: int = 0, skip: int = 0) -> Tensor:
    """`n` different, non-overlapping windows (n, seq_len) drawn by `seed` after `skip` tokens.

    They come in the order they were drawn, so the first windows of a larger draw with the same seed
    are those of a smaller one. Raises InputError when the text has fewer than `n` windows.
    """
    rest = stream[skip:]
    available = len(rest) // _checked(seq_len)
    if n < 1:
        raise InputError(f"samples must be at least 1, got {n}")
    if available < n:
        raise InputError(
            f"{n} samples of {seq_len} tokens need {n * seq_len} tokens, the text has {len(rest)}; "
            "use a longer text, fewer samples, or a smaller sequence length"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:n]
    return rest[: available * seq_len].view(available, seq_len)[chosen]


def sample_mix(streams: Mapping[str, Tensor], seq_len: int, n: int, seed: int = 0) -> Tensor:
    """`n` windows (n, seq_len), drawn by `seed` in turn from each of the named `streams`.

    So every source gives an equal share, and the first windows are shared equally too. A single
    source gives what `sample_windows` gives. Raises InputError when a source is too short for its
    share, or there are fewer windows than sources.
    """
    if n < len(streams):
        raise InputError(
            f"too few samples ({n}) for {len(streams)} texts to have a share each; take more"
        )
    windows = torch.empty(n, _checked(seq_len), dtype=torch.long)
    for first, (name, stream) in enumerate(streams.items()):
        share = len(range(first, n, len(streams)))
        try:
            windows[first :: len(streams)] = sample_windows(stream, seq_len, share, seed)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return windows


def _checked(seq_len: int) -> int:
    if seq_len < 2:
        raise InputError(f"the sequence length must be at least 2, got {seq_len}")
    return seq_len


def _tokenise(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: a stream is longer than any model's context, and is cut into windows later
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(encoded, dtype=torch.long)


def _source(spec: str) -> Iterator[str]:
    if not spec.strip():
        raise InputError("an empty name stands where a text is expected")
    if spec == BUILTIN:
        return _pydocs()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if spec in SHORT_NAMES or spec.startswith("hf:"):
        return _hub(SHORT_NAMES.get(spec, spec))
    raise InputError(
        f"text {spec!r}: no such file or folder; give a path, hf:NAME[:CONFIG[:SPLIT]], "
        f"{BUILTIN}, or one of {', '.join(SHORT_NAMES)}"
    )


def _pydocs() -> Iterator[str]:
    """The Python language reference that the standard library carries, about 0.7 MB."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _folder(folder: Path) -> Iterator[str]:
    files = sorted(f for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise InputError(f"{folder}: no {' '.join(SUFFIXES)} files in this folder")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[str]:
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    return readers.get(path.suffix, _plain)(path)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if b"\0" in content:
        raise InputError(f"{path}: not text (it has zero bytes)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start} is wrong)") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # or line ends would count as tokens


def _plain(path: Path) -> Iterator[str]:
    yield _read(path)


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON: {error}") from error
            yield _document(record, f"{path}: line {number}")


def _json(path: Path) -> Iterator[str]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON: {error}") from error
    if isinstance(content, dict):  # one record, or {"data": [records]}
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _document(record, f"{path}: record {number}")


def _csv(path: Path) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    for number, record in enumerate(csv.DictReader(_read(path).splitlines(True)), start=1):
        yield _document(record, f"{path}: record {number}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path}: reading it needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield _document(record, f"{path}: record {number}")
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file, or damaged") from error


def _document(record: Any, where: str) -> str:
    """The text of one record: itself, its text field, or the parts of an instruction."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{where}: neither a string nor an object with a text field")
    for field in TEXT_FIELDS:
        if isinstance(record.get(field), str):
            return record[field]
    texts = [
        next((record[field] for field in fields if isinstance(record.get(field), str)), "")
        for fields in PART_FIELDS
    ]
    if not any(texts):
        raise InputError(f"{where}: no field named {', '.join(TEXT_FIELDS)} or instruction")
    return "\n".join(text for text in texts if text)


def _hub(spec: str) -> Iterator[str]:
    name, config, split = (*spec.removeprefix("hf:").split(":"), "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"text {spec!r} comes from the hub and needs the package datasets: "
            f"pip install datasets; or give a local file, or {BUILTIN}"
        ) from error
    source: dict[str, Any] = {"path": name, "name": config or None, "split": split or "train"}
    if name in SCRIPTED:
        copy = f"hf://datasets/{name}@refs/convert/parquet/{config}/{split}/*.parquet"
        source = {"path": "parquet", "data_files": copy, "split": "train"}
    try:
        rows = load_dataset(**source, streaming=True)
        records = list(rows.take(MAX_STREAMED_ROWS))
    except Exception as error:  # the hub client raises errors of four libraries
        raise InputError(
            f"text {spec!r} could not be fetched from the hub ({type(error).__name__}); "
            f"check the name and the network, or give a local file, or {BUILTIN}"
        ) from error
    for number, record in enumerate(records, start=1):
        yield _document(record, f"{spec}: record {number}")
