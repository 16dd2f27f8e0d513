"""Files by their suffix, folders by what wrote them, and the splits in both."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import ipc
from read_data import training_data
from tiny import tiny_tokenizer

from fastprune.data import files
from fastprune.data.describe import describe
from fastprune.data.files import folder_files, form_of, split_of
from fastprune.data.records import read_file, source_files
from fastprune.errors import InputError

PAIRS = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(4)]
LINES = "\n".join(map(json.dumps, PAIRS))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def values(path):
    return [record.value for record in read_file(path)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonlines", "A.JSONL", "a.json"])
def test_lines_of_json_under_every_name(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert values(tmp_path / name) == PAIRS
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(LINES)
    assert values(tmp_path / f"{name}.gz") == PAIRS


@pytest.mark.parametrize(
    ("name", "sign"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.TSV", "\t")]
)
def test_tables_under_every_sign(tmp_path, name, sign):
    rows = [sign.join(PAIRS[0]), *(sign.join(pair.values()) for pair in PAIRS)]
    (tmp_path / name).write_text("\n".join(rows))
    assert values(tmp_path / name) == PAIRS


@pytest.mark.parametrize("write", [ipc.new_stream, ipc.new_file])
def test_arrow_in_both_forms(tmp_path, write):
    table = pyarrow.Table.from_pylist(PAIRS)
    with write(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert values(tmp_path / "a.arrow") == PAIRS
    (tmp_path / "b.arrow").write_bytes(b"hello")
    with pytest.raises(InputError, match="not an Arrow file"):
        values(tmp_path / "b.arrow")


@pytest.mark.parametrize(
    "content",
    [
        {"train": PAIRS},
        {"version": "1", "data": PAIRS},
        {f"id-{n}": pair for n, pair in enumerate(PAIRS)},
        {key: [pair[key] for pair in PAIRS] for key in PAIRS[0]},
        {key: {str(n): pair[key] for n, pair in enumerate(PAIRS)} for key in PAIRS[0]},
    ],
)
def test_containers_of_records(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert values(tmp_path / "a.json") == PAIRS


def test_records_on_several_lines_each(tmp_path):
    (tmp_path / "a.json").write_text("\n".join(json.dumps(pair, indent=1) for pair in PAIRS))
    assert values(tmp_path / "a.json") == PAIRS
    record = {"instruction": "Say 1.", "output": "1.", "tags": ["short"]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert values(tmp_path / "a.json") == [record]


@pytest.mark.parametrize("name", ["a.md", "a.gz", "a.jsonl.zip", "a.parquet.gz"])
def test_unknown_suffixes_are_refused(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert form_of(tmp_path / name) is None
    with pytest.raises(InputError, match=r"are not read; give one of .txt .jsonl"):
        source_files(str(tmp_path / name))


def test_a_file_without_a_suffix_is_text_where_it_is_named(tmp_path):
    (tmp_path / "LICENSE").write_text("Take it.")
    assert "".join(values(tmp_path / "LICENSE")) == "Take it."
    with pytest.raises(InputError, match="files in this folder"):
        source_files(str(tmp_path))


def test_a_damaged_gzip_file_is_refused(tmp_path):
    (tmp_path / "a.txt.gz").write_text("plain")
    with pytest.raises(InputError, match="not a gzip file"):
        values(tmp_path / "a.txt.gz")


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.txt", "inner/b.txt", ".hidden/c.txt", ".d.txt", "inner/.git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert folder_files(tmp_path) == [tmp_path / "a.txt", tmp_path / "inner/b.txt"]


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILES", 2)
    for name in ("a.txt", "b"):
        (tmp_path / name).write_text("x")
    assert folder_files(tmp_path) == [tmp_path / "a.txt"]
    (tmp_path / "c").touch()
    with pytest.raises(InputError, match="more than 2 files in this folder"):
        folder_files(tmp_path)


def test_what_save_to_disk_wrote(tmp_path):
    table = pyarrow.Table.from_pylist(PAIRS)
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "cache-0f.arrow"):
        with ipc.new_stream(str(folder / name), table.schema) as file:
            file.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    listed = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
    assert source_files(str(tmp_path / "saved")) == [folder / listed[0]["filename"]]
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state\.json: damaged"):
        source_files(str(folder))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/dev.jsonl", "validation"),
        ("train/test_0.jsonl", "train"),
        ("alpaca_eval.json", "test"),
        ("latest.jsonl", ""),
        ("restrain.jsonl", ""),
    ],
)
def test_splits_by_their_words(name, split):
    assert split_of(name) == split


def test_only_the_train_split_is_learnt_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:3])))
    (folder / "test-0.jsonl").write_text(json.dumps(PAIRS[3]))
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"text": "about"}}))
    data = training_data(folder, tiny_tokenizer(), seq_len=256)
    assert (len(data.train), data.findings) == (3, [])
    said = describe(data, tiny_tokenizer())[0]
    assert said.endswith(
        "taken for instructions, 3 records, from train-0.jsonl; of other splits, not read: "
        "test-0.jsonl"
    )
    alone = training_data(folder / "test-0.jsonl", tiny_tokenizer(), seq_len=256)
    assert len(alone.train) == 1
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": PAIRS[:3], "validation": PAIRS[3:]}))
    data = training_data(splits, tiny_tokenizer(), seq_len=256)
    assert [(f.problem, f.count) for f in data.findings] == [("other split", 1)]
    assert len(data.train) == 3


def test_the_first_sample_as_the_model_sees_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Say\x1b[31m it.", "response": "It.\u202e" + "x" * 900}))
    data = training_data(path, tiny_tokenizer(), seq_len=2048)
    first, _, sample = describe(data, tiny_tokenizer())
    assert first == f"data: {path}: taken for instructions, 1 record"
    assert r"### Instruction:\nSay\x1b[31m it.\n\n### Response:\n⟦It.\u202exxx" in sample
    assert sample.endswith("xx<|end|>⟧") and " … " in sample
    assert sample.isprintable() and len(sample) < 900
    data = training_data(path, tiny_tokenizer(), seq_len=2048, seq2seq=True)
    assert describe(data, tiny_tokenizer())[2].startswith(r"Say\x1b[31m it.<|end|>⟦It.")
    text = tmp_path / "a.txt"
    text.write_text("The river")
    data = training_data(text, tiny_tokenizer(), seq_len=64)
    assert describe(data, tiny_tokenizer())[2] == "⟦The river<|end|>⟧"
