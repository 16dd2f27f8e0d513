"""Files read a piece at a time say what they say when read as a whole."""

import json
import tracemalloc

import pytest

from fastprune.data import records
from fastprune.data.records import Record, read_file
from fastprune.errors import InputError


def values(path):
    return [record.value for record in read_file(path)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_pieces_of_any_size_join_to_the_text(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "READ_BYTES", size)
    text = "\n第一段。 One word\n\n\nÄ long_long_word two\n  three\n" * 3
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    read = list(read_file(path))
    assert "".join(record.value for record in read) == text
    assert [record.more for record in read] == [True] * (len(read) - 1) + [False]
    assert len(read) > 1 or size == 64
    for before, after in zip(read, read[1:]):  # no word and no row of line ends is cut
        assert before.value[-1] == "\n" or after.value[0] == " "
        assert after.value[0] != "\n"


@pytest.mark.parametrize("size", [1, 3, 64])
def test_lines_of_any_length(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "READ_BYTES", size)
    texts = ["eins", "", "细胞\u2028理论", "a\nb" * 50]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n\n".join(json.dumps(t, ensure_ascii=False) for t in texts), "utf-8")
    assert values(path) == texts
    assert [record.where for record in read_file(path)][1] == f"{path}: line 3"
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"of two\nlines",1\nlast,2', "utf-8")
    assert values(path) == [{"text": "of two\nlines", "n": "1"}, {"text": "last", "n": "2"}]


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_wrong_byte_is_found_where_it_is(tmp_path, monkeypatch, size, start):
    monkeypatch.setattr(records, "READ_BYTES", size)
    path = tmp_path / "a.txt"
    content = start + "ä long text, ".encode()
    path.write_bytes(content + b"caf\xe9 and more")
    with pytest.raises(InputError, match=rf"byte {len(content) + 3} is wrong"):
        values(path)


def test_lines_that_are_not_json_are_told_or_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n"b"\n' + "[" * 100_000, "utf-8")
    told: list[Record] = []
    read = read_file(path, broken=lambda record, reason: told.append(record))
    assert [record.value for record in read] == [{"text": "a"}, "b"]
    assert [record.where for record in told] == [f"{path}: line 2", f"{path}: line 4"]
    with pytest.raises(InputError, match="line 2 is not JSON"):
        values(path)


def test_json_files_of_every_shape(tmp_path):
    record = {"messages": [{"role": "user", "content": "x"}]}
    for content in (
        json.dumps([record, record]),
        json.dumps({"version": 1, "data": [record, record]}),
        f"{json.dumps(record)}\n{json.dumps(record)}\n",  # one object a line
    ):
        (tmp_path / "a.json").write_text(content)
        assert values(tmp_path / "a.json") == [record, record]
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert values(tmp_path / "a.json") == [record]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "READ_BYTES", 1 << 16)
    path = tmp_path / name
    line = json.dumps("The river that runs past the old mill. " * 20) + "\n"
    with path.open("w") as file:
        for _ in range(5000):
            file.write(line)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path)) > 50
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the bytes, their text, what is left of the piece before, and its lines: a few pieces at most
    assert peak < 10 * (1 << 16) < path.stat().st_size / 5
