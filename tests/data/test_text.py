"""Sources of text, and windows cut from them."""

import copy
import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny import TEXT, tiny_tokenizer
from tokenizers import processors

from fastprune.data import records, text
from fastprune.data.records import SHORT_NAMES
from fastprune.data.text import (
    eval_windows,
    load_documents,
    load_sources,
    opening,
    sample_mix,
    sample_windows,
    token_stream,
)
from fastprune.errors import InputError

DOCUMENTS = ["The first document.", "The second one,\nof two lines."]


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def jsonl(records):
    return "\n".join(json.dumps(record) for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl([{"text": d} for d in DOCUMENTS])),
        ("b.jsonl", jsonl([{"id": 1, "content": d} for d in DOCUMENTS]) + "\n\n"),
        ("c.json", json.dumps([{"text": d} for d in DOCUMENTS])),
        ("d.json", json.dumps(DOCUMENTS)),
        ("e.json", json.dumps({"version": 1, "data": [{"text": d} for d in DOCUMENTS]})),
        ("f.csv", 'id,text\n1,The first document.\n2,"The second one,\nof two lines."\n'),
    ],
)
def test_record_files(tmp_path, name, content):
    assert load_documents(str(write(tmp_path / name, content))) == DOCUMENTS


def test_parquet(tmp_path):
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    assert load_documents(tmp_path / "a.parquet") == DOCUMENTS


def test_instructions_are_joined(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "context": "", "response": "Hello."},
    ]
    path = write(tmp_path / "a.jsonl", jsonl(records))
    assert load_documents(path) == ["Add.\n1 and 2\n3", "Greet.\nHello."]


def test_plain_text_is_one_document_with_plain_line_ends(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\rthree\n".encode())
    assert load_documents(path) == ["one\ntwo\nthree\n"]


def test_folders_and_lists_keep_their_order(tmp_path):
    write(tmp_path / "2.txt", "second")
    write(tmp_path / "1.txt", "first")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "3.jsonl", jsonl(["third"]))
    write(tmp_path / "ignored.bin", b"\0")
    assert load_documents(tmp_path) == ["first", "second", "third"]
    both = f"{tmp_path / '2.txt'}, {tmp_path / '1.txt'}"
    assert load_documents(both) == ["second", "first"]


def test_self_is_no_text_to_read():
    with pytest.raises(InputError, match="prune --calib"):
        load_documents("self")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\t\n", "no text"),
        ("a.txt", b"text\0text", "zero bytes"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "neither a string nor an object"),
        ("a.jsonl", b'{"label": 1}', "no field named text"),
        ("a.jsonl", b"", "no text"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[]", "no text"),
        ("a.csv", b"id\n1\n", "no field named text"),
        ("a.parquet", b"hello", "not a Parquet file"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        load_documents(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_missing_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for spec, message in (
        ("", "empty name"),
        ("a.txt,", "no such file"),
        (str(tmp_path / "none.txt"), "no such file"),
        (str(tmp_path / "empty"), "files in this folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_documents(spec)


@pytest.mark.parametrize("spec", ["hf:owner/no-such-data", *SHORT_NAMES])
def test_hub_data_without_a_network_is_an_input_error(spec):
    with pytest.raises(InputError, match=r"needs the package datasets|could not be fetched"):
        load_documents(spec)


class FakeRows(list):
    def take(self, n):
        return self[:n]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:a/b", {"path": "a/b", "name": None, "split": "train"}),
        ("hf:a/b:c", {"path": "a/b", "name": "c", "split": "train"}),
        ("hf:a/b::test", {"path": "a/b", "name": None, "split": "test"}),
        (
            "wikitext2",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        ),
    ],
)
def test_hub_data_is_streamed(spec, expected, monkeypatch):
    asked = {}

    def load_dataset(**source):
        asked.update(source)
        return FakeRows([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_documents(spec) == ["one", "two"]
    assert asked == expected | {"streaming": True}


def test_a_limited_stream_is_the_beginning_of_the_whole():
    tokenizer = tiny_tokenizer()
    documents = [TEXT * 3] * 20
    whole = token_stream(tokenizer, documents)
    assert whole.tolist() == tokenizer("\n\n".join(documents)).input_ids
    for limit in (1, 100, 1000, len(whole), len(whole) + 1):
        assert torch.equal(token_stream(tokenizer, documents, limit), whole[:limit])


def test_a_limited_stream_of_long_tokens():
    """Where a token covers more text than expected, the first guess is too short."""
    documents = ["    \n" * 2 + "the mill " * 4000]
    tokenizer = tiny_tokenizer()
    whole = token_stream(tokenizer, documents)
    assert torch.equal(token_stream(tokenizer, documents, 5000), whole[:5000])


def test_eval_windows_start_at_the_beginning():
    stream = torch.arange(25)
    assert eval_windows(stream, 8, 2).tolist() == [list(range(8)), list(range(8, 16))]
    assert eval_windows(stream, 8).shape == (3, 8)


def test_eval_windows_say_when_there_are_fewer(caplog):
    assert eval_windows(torch.arange(25), 8, 10).shape == (3, 8)
    assert "only 3 windows" in caplog.text


def test_sampled_windows_are_distinct_and_reproducible():
    stream = torch.arange(1000)
    windows = sample_windows(stream, 10, 50, seed=3, skip=105)
    starts = windows[:, 0].tolist()
    assert len(set(starts)) == 50
    assert min(starts) >= 105
    assert all((start - 105) % 10 == 0 for start in starts)
    assert torch.equal(windows - windows[:, :1], torch.arange(10).expand(50, 10))
    assert torch.equal(windows, sample_windows(stream, 10, 50, seed=3, skip=105))
    assert torch.equal(windows[:20], sample_windows(stream, 10, 20, seed=3, skip=105))
    assert not torch.equal(windows, sample_windows(stream, 10, 50, seed=4, skip=105))


def with_bos(tokenizer):
    """`tokenizer`, which puts a BOS token before every text by itself from now on."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_windows_open_as_the_tokenizer_opens_a_text():
    assert opening(tiny_tokenizer()).tolist() == []
    tokenizer = with_bos(copy.deepcopy(tiny_tokenizer()))
    bos = opening(tokenizer)
    assert bos.tolist() == [tokenizer.bos_token_id]
    stream = torch.arange(1000, 1100)
    windows = eval_windows(stream, 8, 3, bos)
    assert windows.shape == (3, 8)
    assert windows[:, 0].tolist() == 3 * bos.tolist()
    assert torch.equal(windows[:, 1:].flatten(), stream[:21])
    drawn = sample_mix({"a": stream}, 8, 5, seed=3, opening=bos)
    assert torch.equal(drawn, sample_windows(stream, 8, 5, 3, opening=bos))
    assert drawn.shape == (5, 8)
    assert drawn[:, 0].tolist() == 5 * bos.tolist()
    assert not ((drawn[:, 1] - 1000) % 7).any()
    assert torch.equal(drawn[:, 1:] - drawn[:, 1:2], torch.arange(7).expand(5, 7))


def test_sources_keep_their_names_and_count_once(tmp_path):
    a, b = str(write(tmp_path / "a.txt", "first")), str(write(tmp_path / "b.txt", "second"))
    assert load_sources(f"{b},{a},{b}") == {b: ["second"], a: ["first"]}
    assert load_documents(f"{b},{a},{b}") == ["second", "first"]


def test_a_mix_takes_equal_shares_whatever_the_lengths():
    streams = {"long": torch.arange(10_000), "short": torch.arange(20_000, 20_040)}
    windows = sample_mix(streams, 10, 7, seed=3)
    assert (windows[:, 0] >= 20_000).tolist() == [False, True, False, True, False, True, False]
    assert len(set(windows[:, 0].tolist())) == 7
    assert torch.equal(windows[::2], sample_windows(streams["long"], 10, 4, seed=3))
    assert torch.equal(windows, sample_mix(streams, 10, 7, seed=3))
    assert torch.equal(windows[:4], sample_mix(streams, 10, 4, seed=3))
    assert not torch.equal(windows, sample_mix(streams, 10, 7, seed=4))


def test_a_mix_of_one_is_that_one():
    stream = torch.arange(1000)
    assert torch.equal(sample_mix({"a": stream}, 10, 50, 3), sample_windows(stream, 10, 50, 3))


def test_a_mix_that_cannot_be_even_is_refused():
    streams = {"long": torch.arange(1000), "short": torch.arange(20)}
    with pytest.raises(InputError, match="short: 3 samples of 10 tokens need 30 tokens"):
        sample_mix(streams, 10, 6)
    with pytest.raises(InputError, match="too few samples"):
        sample_mix(streams, 10, 1)


def test_windows_that_do_not_fit_are_refused():
    stream = torch.arange(100)
    for call, message in (
        (lambda: eval_windows(stream, 101, 1), "has 100 tokens"),
        (lambda: eval_windows(stream, 1, 1), "at least 2"),
        (lambda: eval_windows(stream, 10, 0), "at least 1"),
        (lambda: sample_windows(stream, 10, 11), "need 110 tokens, the text has 100"),
        (lambda: sample_windows(stream, 10, 10, skip=1), "the text has 99"),
        (lambda: sample_windows(stream, 10, 0), "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_pieces_give_the_tokens_of_the_whole(monkeypatch):
    long = "".join(f"{number} – {TEXT} 你好，世界 😀\n\n" for number in range(40))
    whole = text._tokenise(tiny_tokenizer(), long)
    monkeypatch.setattr(text, "PIECE", 500)
    monkeypatch.setattr(text, "OVERLAP", 100)
    assert torch.equal(text._tokenise(tiny_tokenizer(), long), whole)
    assert torch.equal(text._tokenise(tiny_tokenizer(), long[:1200]), whole_of(long[:1200]))


def whole_of(part):
    return torch.tensor(tiny_tokenizer()(part, add_special_tokens=False)["input_ids"])


def test_no_more_is_read_than_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "READ_BYTES", 1000)
    taken = []
    decoded = records._decoded
    monkeypatch.setattr(
        records, "_decoded", lambda path: (taken.append(p) or p for p in decoded(path))
    )
    file = tmp_path / "a.txt"
    file.write_text("word " * 100_000)
    assert text.load_documents(file, 2500) == [("word " * 100_000)[:2500]]
    assert len(taken) < 6


def test_half_a_character_is_no_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a \\ud800"}\n')
    with pytest.raises(InputError, match="line 1: holds half of a surrogate pair"):
        text.load_documents(file)


def test_parquet_that_holds_no_text_is_refused(tmp_path):
    raw = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="not a Parquet file, or damaged"):
        text.load_documents(tmp_path / "a.parquet")
