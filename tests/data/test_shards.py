"""Token ids of nanoGPT, llm.c and NumPy as texts and as training data."""

import numpy as np
import pytest
import torch
from read_data import training_data
from tiny import TEXT, VOCABULARY, tiny_tokenizer

from fastprune.data import shards
from fastprune.data.text import load_documents, load_sources, token_stream
from fastprune.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    return np.asarray(tokenizer(TEXT * 4, add_special_tokens=False)["input_ids"])


def header(magic, count):
    words = np.zeros(256, "<i4")
    words[:3] = magic, 1, count
    return words.tobytes()


def write(path, ids, form):
    match form:
        case "npy16" | "npy32" | "npy64":
            np.save(path, ids.astype({"16": "u2", "32": "u4", "64": "i8"}[form[3:]]))
        case "bin16" | "bin32":
            path.write_bytes(ids.astype({"16": "<u2", "32": "<u4"}[form[3:]]).tobytes())
        case "gpt2":
            path.write_bytes(header(20240520, len(ids)) + ids.astype("<u2").tobytes())
        case "llama3":
            path.write_bytes(header(20240801, len(ids)) + ids.astype("<u4").tobytes())
    return path


FORMS = {"npy16": "npy", "npy32": "npy", "npy64": "npy", "bin16": "bin", "bin32": "bin"}
FORMS |= {"gpt2": "bin", "llama3": "bin"}


@pytest.fixture(params=FORMS)
def file(request, tmp_path, ids):
    return write(tmp_path / f"train.{FORMS[request.param]}", ids, request.param)


def test_a_text_is_the_ids(file, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 50)
    documents = load_documents(file)
    assert token_stream(tokenizer, documents).tolist() == ids.tolist()
    assert token_stream(tokenizer, documents, limit=70).tolist() == ids[:70].tolist()
    assert token_stream(tokenizer, documents).dtype == torch.int64


def test_training_data_is_the_ids(file, tokenizer, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 50)
    data = training_data(file, tokenizer, seq_len=16, cache=tmp_path / "cache")
    windows = torch.cat([item["input_ids"] for item in data.train])
    assert windows.tolist() == ids[: len(windows)].tolist()
    assert len(data.train) == len(ids) // 16 and data.kind == "text"


def test_texts_and_ids_may_follow_each_other(tmp_path, tokenizer, ids):
    write(tmp_path / "a.bin", ids[:40], "bin16")
    write(tmp_path / "b.npy", ids[:30], "npy32")
    (tmp_path / "c.txt").write_text(TEXT)
    spec = ",".join(str(tmp_path / name) for name in ("a.bin", "c.txt", "b.npy"))
    documents = load_documents(spec)
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = [*ids[:40], *text, *ids[:30]]
    assert token_stream(tokenizer, documents).tolist() == whole
    for limit in (10, 45, len(whole) - 5, len(whole) + 5):
        assert token_stream(tokenizer, documents, limit=limit).tolist() == whole[:limit]
    assert len(load_sources(spec)) == 3


def test_a_folder_keeps_its_splits(tmp_path, tokenizer, ids):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("x_val_000.bin", "x_train_001.bin", "x_train_002.bin")):
        write(folder / name, ids[16 * number :][:16], "gpt2")
    data = training_data(folder, tokenizer, seq_len=16, cache=tmp_path / "cache")
    windows = torch.cat([item["input_ids"] for item in data.train])
    assert windows.tolist() == ids[16:48].tolist()
    (folder / "input.txt").write_text(TEXT)
    assert load_documents(folder) == [TEXT]  # what the ids were made of


@pytest.mark.parametrize("form", FORMS)
def test_ids_beyond_the_vocabulary_are_refused_by_name(tmp_path, tokenizer, ids, form):
    wrong = np.concatenate([ids[:9], [VOCABULARY + 7], ids[:9]])
    file = write(tmp_path / f"a.{FORMS[form]}", wrong, form)
    for read in (
        lambda: token_stream(tokenizer, load_documents(file)),
        lambda: training_data(file, tokenizer, seq_len=8, cache=tmp_path / "cache"),
    ):
        with pytest.raises(InputError, match=rf"a\.\w+: holds the token id {VOCABULARY + 7} "):
            read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "0 bytes"),
        ("a.bin", b"abc", "3 bytes"),
        ("a.bin", header(20240520, 9) + b"\1\0" * 8, "holds 8 token ids, its header says 9"),
        ("a.bin", header(20240520, 9)[:40], "copy it again"),
        ("a.npy", b"\x93NUMPY", "not an array"),
    ],
)
def test_damaged_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        token_stream(tokenizer, load_documents(tmp_path / name))


@pytest.mark.parametrize("array", [np.ones((2, 2), "u2"), np.ones(4), np.asarray([None])])
def test_arrays_of_anything_else_are_refused(tmp_path, tokenizer, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match="array of"):
        token_stream(tokenizer, load_documents(tmp_path / "a.npy"))


def test_ids_are_no_instructions(tmp_path, tokenizer, ids):
    write(tmp_path / "a.bin", ids, "bin16")
    with pytest.raises(InputError, match="prompts and answers"):
        training_data(tmp_path / "a.bin", tokenizer, seq_len=8, kind="chat", cache=tmp_path)
