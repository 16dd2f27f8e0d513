"""TEXT on the command line to token windows.

TEXT is what `data.records` reads. Every figure that depends on a text says in which windows it was
read, so the text is one stream: documents joined by a blank line.

Windows from the start read several sources one after the other; windows drawn by a seed
(`sample_mix`) come in equal shares from all of them, whatever their lengths.

Every window begins with its `opening`: what the tokenizer puts before a text by itself, such as a
BOS token. Models that have learnt every text with one have a far higher perplexity without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.data.records import read_source, source_files, source_names
from fastprune.data.shards import TokenShard
from fastprune.data.wording import affixes
from fastprune.errors import InputError

CHARACTERS_PER_TOKEN = 6  # more than English takes, so that one try is enough
PIECE, OVERLAP = 1 << 20, 1 << 12  # characters that are tokenised at once
ENOUGH = 8_000_000  # characters that are read of any text
EDGE_TOKENS = 64  # the last tokens before a cut may differ from those of the whole text

NOTHING = torch.empty(0, dtype=torch.long)

TEXT_FIELDS = ("text", "content", "sentence", "document")
"""Fields that hold a whole document, in the order they are looked for."""
PART_FIELDS = (
    ("instruction", "prompt", "question", "query", "problem"),
    ("input", "context"),
    ("output", "response", "answer", "completion", "solution"),
)
"""Fields of an instruction record; those it has are joined in this order."""

Document = str | TokenShard
"""A text, or the token ids of one."""

log = logging.getLogger("fastprune")


def characters_for(tokens: int) -> int:
    """How many characters to read of a text of which so many tokens are wanted: a good deal more
    than they take, so that windows can be drawn from all over a text of ordinary size."""
    return max(ENOUGH, 32 * tokens)


def load_documents(spec: str | Path, characters: int | None = None) -> list[Document]:
    """The documents that `spec` names, none of them blank, in the order of the sources.

    `characters` and errors as of `load_sources`.
    """
    return [text for documents in load_sources(spec, characters).values() for text in documents]


def load_sources(spec: str | Path, characters: int | None = None) -> dict[str, list[Document]]:
    """The documents of each source that `spec` names, by its name; one named twice counts once.

    Of a source that has more than `characters` characters, only the first ones are read. Raises
    InputError for a source that is missing, unreadable, binary, or empty.
    """
    sources: dict[str, list[Document]] = {}
    for part in source_names(spec):
        sources[part] = [
            text
            for text in _documents(part, characters)
            if isinstance(text, TokenShard) or text.strip()
        ]
        if not sources[part]:
            raise InputError(f"{part}: no text in it")
    return sources


def check_text(spec: str | Path) -> None:
    """InputError where a source of `spec` is missing, or a file of it is unreadable or empty.

    Only the beginning of a source is read, and none of the hub's data sets.
    """
    for name in source_names(spec):
        if not source_files(name):
            continue
        for record in read_source(name):
            if isinstance(record.value, TokenShard) or document(record.value, record.where).strip():
                break
        else:
            raise InputError(f"{name}: no text in it")


def token_stream(tokenizer: Any, documents: Iterable[Document], limit: int | None = None) -> Tensor:
    """All documents as one stream of token ids (tokens,), int64; texts are joined by a blank line.

    No special tokens are added. `limit` stops after that many tokens; they are the first ones of
    the whole stream, found without tokenising much more of the text than they cover. Raises
    InputError for token ids that `tokenizer` does not have.
    """
    parts = [torch.empty(0, dtype=torch.long)]
    for _, run in groupby(documents, lambda document: isinstance(document, TokenShard)):
        for part in _streams(tokenizer, list(run), limit):
            parts.append(part)
            limit = None if limit is None else limit - len(part)
    return torch.cat(parts)


def _streams(tokenizer: Any, documents: list[Document], limit: int | None) -> Iterator[Tensor]:
    """The streams of documents that are all texts, which make one, or all token ids."""
    texts = [document for document in documents if isinstance(document, str)]
    if texts:
        yield _text_stream(tokenizer, texts, limit)
    for shard in documents:
        if isinstance(shard, TokenShard) and limit != 0:
            ids = torch.from_numpy(shard.ids(tokenizer, limit))
            limit = None if limit is None else limit - len(ids)
            yield ids


def _text_stream(tokenizer: Any, documents: list[str], limit: int | None) -> Tensor:
    text = "\n\n".join(documents)
    size = len(text) if limit is None else limit * CHARACTERS_PER_TOKEN
    while limit is not None and size < len(text):
        tokens = _tokenise(tokenizer, text[:size])
        whole = tokens[:-EDGE_TOKENS]
        if len(whole) >= limit:
            return whole[:limit]
        size *= 2
    return _tokenise(tokenizer, text)[:limit]


def opening(tokenizer: Any) -> Tensor:
    """The ids (k,), int64, that `tokenizer` puts before a text by itself; often none."""
    return torch.tensor(affixes(tokenizer)[0], dtype=torch.long)


def eval_windows(
    stream: Tensor, seq_len: int, windows: int | None = None, opening: Tensor = NOTHING
) -> Tensor:
    """The first non-overlapping windows (n, seq_len) of `stream`, n = min(windows, all there are).

    `windows` None takes all. Each begins with `opening` (k,), so that seq_len − k of its tokens are
    those of the stream. Raises InputError when the text is shorter than one window.
    """
    if windows is not None and windows < 1:
        raise InputError(f"windows must be at least 1, got {windows}")
    own = _own(seq_len, opening)
    available = len(stream) // own
    if available == 0:
        raise InputError(
            f"the text has {len(stream)} tokens, fewer than one window of {seq_len}; "
            "use a longer text or a smaller sequence length"
        )
    n = available if windows is None else min(windows, available)
    if windows is not None and n < windows:
        log.warning("the text has only %d windows of %d tokens, not %d", n, seq_len, windows)
    return _opened(stream[: n * own].view(n, own), opening)


def sample_windows(
    stream: Tensor, seq_len: int, n: int, seed: int = 0, skip: int = 0, opening: Tensor = NOTHING
) -> Tensor:
    """`n` different, non-overlapping windows (n, seq_len) drawn by `seed` after `skip` tokens.

    Each begins with `opening`, as for `eval_windows`. They come in the order they were drawn, so
    the first windows of a larger draw with the same seed are those of a smaller one. Raises
    InputError when the text has fewer than `n` windows.
    """
    rest, own = stream[skip:], _own(seq_len, opening)
    available = len(rest) // own
    if n < 1:
        raise InputError(f"samples must be at least 1, got {n}")
    if available < n:
        raise InputError(
            f"{n} samples of {seq_len} tokens need {n * own} tokens, the text has {len(rest)}; "
            "use a longer text, fewer samples, or a smaller sequence length"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:n]
    return _opened(rest[: available * own].view(available, own)[chosen], opening)


def sample_mix(
    streams: Mapping[str, Tensor], seq_len: int, n: int, seed: int = 0, opening: Tensor = NOTHING
) -> Tensor:
    """`n` windows (n, seq_len), drawn by `seed` in turn from each of the named `streams`.

    Each begins with `opening`, as for `eval_windows`. So every source gives an equal share, and the
    first windows are shared equally too. A single source gives what `sample_windows` gives. Raises
    InputError when a source is too short for its share, or there are fewer windows than sources.
    """
    if n < len(streams):
        raise InputError(
            f"too few samples ({n}) for {len(streams)} texts to have a share each; take more"
        )
    windows = torch.empty(n, _checked(seq_len), dtype=torch.long)
    for first, (name, stream) in enumerate(streams.items()):
        share = len(range(first, n, len(streams)))
        try:
            windows[first :: len(streams)] = sample_windows(
                stream, seq_len, share, seed, opening=opening
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return windows


def _own(seq_len: int, opening: Tensor) -> int:
    """Tokens of the stream in a window."""
    return max(_checked(seq_len) - len(opening), 1)


def _opened(windows: Tensor, opening: Tensor) -> Tensor:
    """`windows` (n, s) with `opening` (k,) before each."""
    return torch.cat([opening.expand(len(windows), -1), windows], dim=1)


def _checked(seq_len: int) -> int:
    if seq_len < 2:
        raise InputError(f"the sequence length must be at least 2, got {seq_len}")
    return seq_len


def _tokenise(tokenizer: Any, text: str) -> Tensor:
    """The token ids of `text` (tokens,), made of pieces of it, for the library keeps some hundred
    bytes a character while it works.

    Two pieces overlap, and are joined where both have a token begin at the same character, far from
    their ends: so the ids are those of the whole text.
    """
    if len(text) <= 2 * PIECE or not tokenizer.is_fast:
        return torch.tensor(_encoded(tokenizer, text)["input_ids"], dtype=torch.long)
    parts, begin, start = [], 0, 0  # the next part is wanted from `begin` on, and read from `start`
    while start < len(text):
        encoded = _encoded(tokenizer, text[start : start + PIECE], return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
        places = torch.tensor(encoded["offset_mapping"], dtype=torch.long).reshape(-1, 2)[:, 0]
        places += start
        parts.append((ids, places))
        start += PIECE - OVERLAP if start + PIECE < len(text) else PIECE
    streams = []
    for (ids, places), (_, following) in pairwise(parts):
        middle = int(following[0]) + OVERLAP // 2
        common = places[torch.isin(places, following) & (places >= middle)]
        end = int(common[0]) if len(common) else int(places[-1])
        streams.append(ids[(places >= begin) & (places < end)])
        begin = end
    ids, places = parts[-1]
    return torch.cat([*streams, ids[places >= begin]])


def _encoded(tokenizer: Any, text: str, **options: Any) -> Any:
    # verbose=False: a stream is longer than any model's context, and is cut into windows later
    return tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
    )


def _documents(name: str, characters: int | None) -> Iterator[Document]:
    """The documents of one source, which end after `characters`; token ids do not count."""
    pieces: list[str] = []
    left = characters
    for record in read_source(name):
        if isinstance(record.value, TokenShard):
            yield record.value
            continue
        pieces.append(document(record.value, record.where)[:left])
        left = None if left is None else left - len(pieces[-1])
        if not record.more or left == 0:
            yield "".join(pieces)
            pieces.clear()
        if left == 0:
            log.info("%s: only its first %d characters are read", name, characters)
            return


def small_names(record: Mapping[Any, Any]) -> dict[str, Any]:
    """`record` with the names of its fields in small letters; one that is so already comes first.

    `Instruction` and `instruction` are the same field.
    """
    small = {str(name).strip().lower(): value for name, value in record.items()}
    return small | {name: value for name, value in record.items() if name in small}


def document(record: Any, where: str) -> str:
    """The text of one record: itself, its text field, or the parts of an instruction.

    Raises InputError, naming the place `where`, for a record without a text, and for a text that
    cannot be encoded.
    """
    text = _text_of(record, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no text") from error
    return text


def _text_of(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{where}: neither a string nor an object with a text field")
    record = small_names(record)
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
