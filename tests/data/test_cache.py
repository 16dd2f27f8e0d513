"""Tokens on the disk: reused, made anew when what they depend on changes, whole or not there."""

import copy
import json
import lzma
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from read_data import training_data
from tiny import TEXT, tiny_tokenizer

from fastprune.data import builtin, tokenise
from fastprune.data.cache import Store, StoreWriter
from fastprune.data.records import Record
from fastprune.errors import InputError


@pytest.fixture
def tokenizer():
    return copy.deepcopy(tiny_tokenizer())


@pytest.fixture
def calls(monkeypatch):
    """The texts that tokenizers were given, but for the letter that shows how they open one."""
    given = []
    kind = type(tiny_tokenizer())
    original = kind.__call__

    def counting(self, text, *arguments, **options):
        given.extend(t for t in ([text] if isinstance(text, str) else text) if t != "a")
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", counting)
    return given


def write(path, n=6, field="text"):
    path.write_text("\n".join(json.dumps({field: f"{i} {TEXT}"}) for i in range(n)), "utf-8")
    return path


def items(data):
    return [data.train[n]["input_ids"].tolist() for n in range(len(data.train))]


def test_tokens_are_made_once(tmp_path, tokenizer, calls):
    path = write(tmp_path / "a.jsonl")
    first = training_data(path, tokenizer, seq_len=32, cache=tmp_path / "cache")
    assert len(calls) >= 6
    calls.clear()
    again = training_data(path, tokenizer, seq_len=32, cache=tmp_path / "cache")
    other = training_data(path, tokenizer, seq_len=64, seed=1, val_size=2, cache=tmp_path / "cache")
    assert calls == []
    assert items(again) == items(first)
    assert again.to_dict() == first.to_dict()
    assert len(other.train) + 2 == sum(map(len, items(first))) // 64


def test_they_are_made_anew_when_something_changes(tmp_path, tokenizer, calls):
    path = write(tmp_path / "a.jsonl")
    records = [{"prompt": f"{i}?", "response": "Yes."} for i in range(3)]
    pairs = tmp_path / "b.jsonl"
    pairs.write_text("\n".join(map(json.dumps, records)), "utf-8")

    def made(source=path, **options):
        calls.clear()
        training_data(source, tokenizer, seq_len=32, cache=tmp_path / "cache", **options)
        return bool(calls)

    assert made() and not made()
    write(path, 7)
    assert made() and not made()
    write(path, 6)  # what it was at first
    assert not made()
    assert made(kind="text") and not made(kind="text")
    assert made(pairs) and not made(pairs)
    assert made(pairs, seq2seq=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert made(pairs) and not made(pairs)
    tokenizer.add_tokens(["mill"])
    assert made() and not made()
    tokenizer([TEXT], truncation=True, max_length=4)  # a passing setting
    assert not made()


def test_the_default_is_the_cache_of_the_user(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    training_data(write(tmp_path / "a.jsonl"), tokenizer, seq_len=32)
    assert [p.name.partition("-")[0] for p in (tmp_path / "fastprune").iterdir()] == ["tokens"]


def test_an_interrupted_write_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    monkeypatch.setattr(tokenise, "BATCH_RECORDS", 2)
    expected = items(training_data(path, tokenizer, seq_len=32, cache=tmp_path / "other"))
    add = StoreWriter.add

    def interrupted(self, ids, learnt, record):
        if record.number == 4:
            raise KeyboardInterrupt
        add(self, ids, learnt, record)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training_data(path, tokenizer, seq_len=32, cache=cache)
        assert list(cache.iterdir()) == []
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed: no one tidies up
        with pytest.raises(KeyboardInterrupt):
            training_data(path, tokenizer, seq_len=32, cache=cache)
    [leftover] = cache.iterdir()
    assert leftover.name.startswith(".tokens-")
    assert list(leftover.rglob("*.bin"))
    training_data(write(tmp_path / "b.jsonl", 3), tokenizer, seq_len=32, cache=cache)
    assert not leftover.exists()  # nor does another source leave it there
    assert items(training_data(path, tokenizer, seq_len=32, cache=cache)) == expected
    leftover.mkdir()  # of one that was killed when it had just put its copy in place
    (leftover / "lock").write_text("1")
    assert items(training_data(path, tokenizer, seq_len=32, cache=cache)) == expected
    assert not leftover.exists()


@pytest.mark.parametrize(
    "name", ["0/tokens-00000.bin", "0/index.npz", "corpus.json", "sealed.json"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "gone"])
def test_a_damaged_copy_is_made_anew(tmp_path, tokenizer, caplog, name, damage):
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    expected = items(training_data(path, tokenizer, seq_len=32, cache=cache))
    [folder] = cache.iterdir()
    file = folder / name
    content = file.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(damaged[damage])
    assert items(training_data(path, tokenizer, seq_len=32, cache=cache)) == expected
    assert "is made anew" in caplog.text
    assert file.read_bytes() == content
    assert list(cache.iterdir()) == [folder]


def test_tokens_that_vanish_while_they_are_read(tmp_path, tokenizer):
    """Fewer tokens than there should be would train on nothing, and say nothing."""
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    data = training_data(path, tokenizer, seq_len=32, cache=cache)
    [file] = cache.rglob("tokens-*.bin")
    os.truncate(file, 10)
    with pytest.raises(InputError, match="was cut short"):
        pickle.loads(pickle.dumps(data.train))[0]


def test_a_document_in_pieces_is_one_document(tmp_path, tokenizer, monkeypatch):
    from fastprune.data import records

    path = tmp_path / "a.txt"
    path.write_text((TEXT + "\n") * 20, "utf-8")
    whole = training_data(path, tokenizer, seq_len=32, cache=tmp_path / "whole")
    monkeypatch.setattr(records, "READ_BYTES", 500)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1000)
    pieces = training_data(path, tokenizer, seq_len=32, cache=tmp_path / "pieces")
    assert pieces.lengths == whole.lengths
    assert items(pieces) == items(whole)


def test_the_tokenizer_gets_a_bounded_amount_at_a_time(tmp_path, tokenizer, monkeypatch):
    sizes = []
    kind = type(tokenizer)
    original = kind.__call__

    def measuring(self, text, *arguments, **options):
        sizes.append(sum(map(len, text)))
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", measuring)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 2000)
    training_data(write(tmp_path / "a.jsonl", 40), tokenizer, seq_len=32, cache=tmp_path / "cache")
    assert len(sizes) > 5
    assert max(sizes) < 2000 + 2 * len(TEXT)  # the limit, and the record that crosses it


def test_shards_read_as_one(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    whole = items(training_data(path, tokenizer, seq_len=50, cache=tmp_path / "whole"))
    monkeypatch.setitem(tokenise.SHARD_TOKENS, "text", 100)
    data = training_data(path, tokenizer, seq_len=50, cache=tmp_path / "shards")
    assert len(list((tmp_path / "shards").rglob("tokens-*.bin"))) == 6
    assert items(data) == whole
    copied = pickle.dumps(data.train)  # as a worker of a DataLoader gets it
    assert len(copied) < 4000
    assert torch.equal(pickle.loads(copied)[3]["input_ids"], data.train[3]["input_ids"])


@pytest.mark.parametrize(("vocabulary", "size"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_as_few_bytes_as_they_can(tmp_path, vocabulary, size):
    ids = np.asarray([0, 1, vocabulary - 1])
    learnt = np.asarray([False, True, True])
    with StoreWriter(tmp_path / "s", vocabulary=vocabulary, masked=True, shard_tokens=10) as writer:
        writer.add(ids, learnt, Record(None, "a", "line", 3))
        writer.add(ids[:2], learnt[:2], Record(None, "b", more=True))
        writer.add(ids[2:], learnt[2:], Record(None, "b"))
    store = Store(tmp_path / "s")
    assert (tmp_path / "s" / "tokens-00000.bin").stat().st_size == size * 6
    assert store.ids(0, 6).tolist() == ids.tolist() * 2
    assert store.mask(1, 6).tolist() == [True, True, False, True, True]
    assert store.lengths.tolist() == [3, 3]
    assert store.learnt.tolist() == [2, 2]
    assert [store.where(0), store.where(1)] == ["a: line 3", "b"]


def test_hub_data_is_fetched_once(tmp_path, tokenizer, monkeypatch):
    class Rows(list):
        def take(self, n):
            return self[:n]

    def load_dataset(**source):
        asked.append(source["path"])
        return Rows({"instruction": f"Say {i}.", "response": str(i)} for i in range(10))

    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(tokenise, "HUB_ROWS", 4)
    options = {"seq_len": 128, "cache": tmp_path / "cache"}
    first = training_data("dolly-15k", tokenizer, **options)
    assert len(first.train) == 4
    tokenizer.add_tokens(["Say"])
    again = training_data("dolly-15k", tokenizer, **options)
    assert len(again.train) == 4
    assert asked == ["databricks/databricks-dolly-15k"]


def test_builtin_text_trains(tmp_path, tokenizer, monkeypatch):
    with lzma.open(tmp_path / "pydocs-1.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(f"{json.dumps(TEXT)}\n{json.dumps('second')}\n")
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    data = training_data("builtin:pydocs", tokenizer, seq_len=16, cache=tmp_path)
    assert TEXT.startswith(tokenizer.decode(data.train[0]["input_ids"]))
    assert data.lengths["document"].count == 2
