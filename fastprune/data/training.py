"""DATA on the command line to data sets for training, with findings about it.

Text becomes one stream a source, each document ended by a token that says so, cut into windows:
everything is learnt. Instructions and chats become one example each, of which the answers and the
end after each are learnt. Examples are padded, not packed: several in one window must not see each
other, which only some attention implementations can promise, and where they cannot, nothing would
tell. Sort them by length instead: `TokenDataset.lengths` says how long they are.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastprune.data.cache import Store
from fastprune.data.checks import Finding, Findings, LengthStatistics
from fastprune.data.columns import Columns
from fastprune.data.examples import KINDS
from fastprune.data.tokenise import Corpus, Part, tokenised
from fastprune.data.wording import affixes
from fastprune.errors import InputError
from fastprune.kernels.reference import IGNORED

PROMPT_SHARE = 0.75  # of an over-long example, at most: what is learnt keeps the rest

log = logging.getLogger("fastprune")

Item = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingData:
    """What DATA became."""

    train: TokenDataset
    validation: TokenDataset | None
    """held out by the seed, shares nothing with `train`; None where nothing was asked for"""
    findings: list[Finding]
    """what is wrong with the data, in the order of checks.PROBLEMS"""
    lengths: dict[str, LengthStatistics]
    """of whole `document`s for text; of `example`, `prompt` and `response` otherwise"""
    kind: str
    """text, instructions or chat; mixed if the sources differ"""
    records: int
    """how many the sources hold, usable or not"""
    parts: list[Part]
    """the tokens of each source, and the files they came from"""

    def to_dict(self) -> dict[str, Any]:
        """For metrics.json and the report."""
        return {
            "kind": self.kind,
            "records": self.records,
            "train": len(self.train),
            "validation": len(self.validation) if self.validation else 0,
            "tokens": int(self.train.lengths.sum()),
            "lengths": {name: value.to_dict() for name, value in self.lengths.items()},
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class Reading:
    """How data is read: what its items are, how many, and which are held out.

    Raises InputError for values out of range.
    """

    seq_len: int
    """tokens of an item at most; with `seq2seq` of its input and of its labels each"""
    samples: int | None = None
    """training items at most, drawn by `seed`"""
    val_size: float = 0
    """items to hold out, or below 1 a share of them"""
    kind: str | Columns = "auto"
    """text, instructions or chat for all sources, or the columns that hold what is to be learnt;
    auto looks at the fields of each source"""
    pack: bool = True
    """join the documents of a text before it is cut; otherwise each has windows of its own"""
    seed: int = 0
    cache: Path | None = None
    """folder of the tokenised copies (default: in the user's cache directory)"""
    seq2seq: bool = False
    """the items are for an encoder-decoder model"""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise InputError(f"the sequence length must be at least 2, got {self.seq_len}")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples must be at least 1, got {self.samples}")
        held = self.val_size
        if not 0 <= held < math.inf or (held > 1 and held != int(held)):
            raise InputError(f"val_size must be a number of examples or a share, got {held}")
        if not isinstance(self.kind, Columns) and self.kind not in ("auto", *KINDS):
            known = ", ".join(KINDS)
            raise InputError(f"kind must be auto or one of {known}, got {self.kind!r}")


def training_data(spec: str | Path, tokenizer: Any, reading: Reading) -> TrainingData:
    """The data that `spec` names, tokenised, checked and split; findings are logged as warnings.

    Raises InputError for sources that cannot be read or hold nothing to train on.
    """
    kind, seq2seq = reading.kind, reading.seq2seq
    corpus = tokenised(spec, tokenizer, kind=kind, seq2seq=seq2seq, cache=reading.cache)
    views = [_view(part, reading, tokenizer) for part in corpus.parts]
    findings = Findings(corpus.findings)
    for view in views:
        if isinstance(view, Examples) and (cut := view.over_long()):
            findings.add("over-long", view.store.where(cut[0]), len(cut))
    for finding in findings:
        log.warning("%s: %s", spec, finding)
    train, validation = _split(views, reading.samples, reading.val_size, reading.seed)
    kinds = {part.kind for part in corpus.parts}
    return TrainingData(
        train,
        validation,
        list(findings),
        _length_statistics(corpus, reading.seq_len),
        kinds.pop() if len(kinds) == 1 else "mixed",
        sum(part.records for part in corpus.parts),
        corpus.parts,
    )


class Windows:
    """Windows of a text: all documents as one stream, or each on its own.

    Each begins with the ids ``opening``, put before it where the text has them not there. What is
    left over at the end of the stream is dropped, except where it is all there is; a document on
    its own keeps its rest.
    """

    def __init__(self, store: Store, seq_len: int, pack: bool, opening: Sequence[int] = ()) -> None:
        self.store = store
        self.opening = np.asarray(opening, dtype=np.int64)
        own = max(seq_len - len(opening), 1)
        edges = np.asarray([0, store.tokens]) if pack else store.ends
        starts, ends = edges[:-1], edges[1:]
        windows = -(-(ends - starts) // own)
        self._starts = np.repeat(starts, windows) + own * _within(windows)
        self._ends = np.minimum(self._starts + own, np.repeat(ends, windows))
        own_lengths = self._ends - self._starts
        keep = own_lengths > 1  # one token has none after it to predict
        if pack:
            keep &= own_lengths == max(own_lengths, default=0)
        self._starts, self._ends = self._starts[keep], self._ends[keep]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every window."""
        own = self._ends - self._starts
        if not len(self.opening):
            return own
        return own + np.asarray([len(self._added(int(start))) for start in self._starts])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Item:
        start, end = int(self._starts[i]), int(self._ends[i])
        whole = np.concatenate([self._added(start), self.store.ids(start, end)])
        ids = torch.from_numpy(whole)
        return {"input_ids": ids, "labels": ids.clone()}

    def _added(self, start: int) -> np.ndarray:
        """What is put before the window that begins at ``start``."""
        there = self.store.ids(start, min(start + len(self.opening), self.store.tokens))
        return self.opening[:0] if np.array_equal(there, self.opening) else self.opening


class Examples:
    """Examples of a causal model: prompt and response in one sequence, the prompt not learnt.

    One that is too long loses its end. If the response would begin in its last quarter or not at
    all, the prompt loses its beginning.
    """

    def __init__(self, store: Store, seq_len: int) -> None:
        self.store = store
        self.seq_len = seq_len

    @property
    def lengths(self) -> np.ndarray:
        return np.minimum(self.store.lengths, self.seq_len)

    def over_long(self) -> list[int]:
        """The entries that are cut."""
        return np.flatnonzero(self.store.lengths > self.seq_len).tolist()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: int) -> Item:
        start, end = map(int, self.store.ends[i : i + 2])
        mask = self.store.mask(start, end)
        skipped = 0
        if len(mask) > self.seq_len:
            first = int(mask.argmax())
            kept = int(self.seq_len * PROMPT_SHARE)
            skipped = max(0, min(first - kept, len(mask) - self.seq_len))
        stop = min(skipped + self.seq_len, len(mask))
        ids = torch.from_numpy(self.store.ids(start + skipped, start + stop))
        learnt = torch.from_numpy(mask[skipped:stop])
        return {"input_ids": ids, "labels": ids.masked_fill(~learnt, IGNORED)}


class Pairs(Examples):
    """Examples of an encoder–decoder model: input and labels apart, both with an end of their own.

    A long input keeps its end token; a long response loses its, for it does not end there.
    """

    @property
    def lengths(self) -> np.ndarray:
        """The longer of input and labels, as cut."""
        learnt = self.store.learnt
        return np.minimum(np.maximum(self.store.lengths - learnt, learnt), self.seq_len)

    def over_long(self) -> list[int]:
        learnt = self.store.learnt
        longer = np.maximum(self.store.lengths - learnt, learnt)
        return np.flatnonzero(longer > self.seq_len).tolist()

    def __getitem__(self, i: int) -> Item:
        start, end = map(int, self.store.ends[i : i + 2])
        ids = torch.from_numpy(self.store.ids(start, end))
        source, target = ids.tensor_split([len(ids) - int(self.store.learnt[i])])
        if len(source) > self.seq_len:
            source = torch.cat([source[: self.seq_len - 1], source[-1:]])
        return {"input_ids": source, "labels": target[: self.seq_len]}


View = Windows | Examples


class TokenDataset(Dataset):
    """Some items of several views; each is {"input_ids", "labels"}, int64 (s,)."""

    def __init__(self, views: Sequence[View], chosen: np.ndarray) -> None:
        self.views = views
        self.chosen = chosen
        self._starts = _starts(views)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every item."""
        return np.concatenate([view.lengths for view in self.views])[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Item:
        item = int(self.chosen[i])
        view = bisect_right(self._starts, item) - 1
        return self.views[view][item - self._starts[view]]


@dataclass
class Collator:
    """Items to a batch, padded on the right to the longest in it.

    Gives `input_ids` and `attention_mask` (n, s), and `labels` (n, s), or (n, t) for an
    encoder–decoder model. Padding has the label -100.
    """

    pad_id: int | None
    """None if the tokenizer has none: any token does, for it is neither attended to nor learnt"""
    multiple_of: int = 1
    """lengths are rounded up to this"""

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        inputs = [item["input_ids"] for item in items]
        return {
            "input_ids": self._padded(inputs, self.pad_id or 0),
            "attention_mask": self._padded([torch.ones_like(ids) for ids in inputs], 0),
            "labels": self._padded([item["labels"] for item in items], IGNORED),
        }

    def _padded(self, rows: Sequence[Tensor], value: int) -> Tensor:
        longest = max(map(len, rows))
        width = -(-longest // self.multiple_of) * self.multiple_of
        batch = torch.full((len(rows), width), value, dtype=torch.long)
        for row, ids in zip(batch, rows):
            row[: len(ids)] = ids
        return batch


def _view(part: Part, reading: Reading, tokenizer: Any) -> View:
    if part.kind == "text":
        return Windows(part.store, reading.seq_len, reading.pack, affixes(tokenizer)[0])
    return (Pairs if reading.seq2seq else Examples)(part.store, reading.seq_len)


def _split(
    views: list[View], samples: int | None, val_size: float, seed: int
) -> tuple[TokenDataset, TokenDataset | None]:
    """Training and validation items; the same seed holds out the same ones whatever `samples`."""
    total = sum(map(len, views))
    if not total:
        raise InputError("the text has a single token, too few to train on; use a longer text")
    held = round(val_size * total) if val_size < 1 else int(val_size)
    if val_size > 0:
        held = max(held, 1)
    if held >= total:
        raise InputError(
            f"a validation set of {held} leaves nothing to train on: the data has {total} "
            "examples; use more data, a smaller validation set, or a smaller sequence length"
        )
    order = np.random.default_rng(seed).permutation(total)
    rest = order[held:]
    if samples is not None and samples < len(rest):
        chosen = rest[:samples]
    else:
        if samples is not None and samples > len(rest):
            log.warning("the data has only %d examples to train on, not %d", len(rest), samples)
        chosen = np.sort(rest)
    validation = TokenDataset(views, np.sort(order[:held])) if held else None
    return TokenDataset(views, chosen), validation


def _length_statistics(corpus: Corpus, seq_len: int) -> dict[str, LengthStatistics]:
    documents = [part.store.lengths for part in corpus.parts if part.kind == "text"]
    examples = [part.store for part in corpus.parts if part.kind != "text"]
    lengths = {"document": documents} if documents else {}
    if examples:
        lengths["example"] = [store.lengths for store in examples]
        lengths["prompt"] = [store.lengths - store.learnt for store in examples]
        lengths["response"] = [store.learnt for store in examples]
    return {
        name: LengthStatistics.of(np.concatenate(values), seq_len)
        for name, values in lengths.items()
    }


def _starts(views: Sequence[View]) -> list[int]:
    """Where the items of each view begin among those of all."""
    return np.cumsum([0, *map(len, views)])[:-1].tolist()


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, … for each of `counts`: (3, 2) gives 0 1 2 0 1."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
