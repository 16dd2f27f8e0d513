"""The bytes of a `.gguf` file: settings, tensors, blocks, and the copy without vocabulary."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from gguf_files import write_gguf
from tiny import tiny_model

from fastprune.errors import InputError
from fastprune.models import gguf_file
from fastprune.models.gguf_blocks import BLOCKS
from fastprune.models.gguf_file import copy_without_words, read_contents, read_tensor


def test_settings_and_tensors_are_those_of_the_reader_in_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", layers=1))
    contents, reader = read_contents(path), GGUFReader(path)
    assert contents.settings == {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert list(contents.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        stored = contents.tensors[tensor.name]
        assert (stored.start, stored.type) == (tensor.data_offset, tensor.tensor_type)
        assert torch.equal(read_tensor(path, stored), torch.tensor(tensor.data))


def test_every_type_of_setting_is_read(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    kinds = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    values = {}
    for kind in kinds:
        values[f"a.{kind}"] = int(np.iinfo(kind).max)
        getattr(writer, f"add_{kind}")(f"a.{kind}", values[f"a.{kind}"])
    values |= {"a.float32": 0.5, "a.float64": 0.1, "a.bool": True, "a.string": "é"}
    for kind in ("float32", "float64", "bool", "string"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", values[f"a.{kind}"])
    values |= {"a.numbers": [3, 1, 2], "a.words": ["a", "", "ß"]}
    for name in ("a.numbers", "a.words"):
        writer.add_array(name, values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = read_contents(tmp_path / "m.gguf").settings
    assert settings == {"general.architecture": "llama", **values}


@pytest.mark.parametrize("name", [*BLOCKS, "F16", "BF16", "Q2_K", "IQ4_NL"])
def test_blocks_are_dequantised_bit_for_bit_as_by_gguf(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "CACHED", 1000)  # not a multiple of the blocks
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = 7, 512
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    if name in ("F16", "BF16"):
        data = quantize(random.standard_normal((rows, columns), dtype=np.float32), kind)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):  # random bytes are infinite scales too
        expected = torch.tensor(dequantize(data, kind))
        found = read_tensor(
            tmp_path / "m.gguf", read_contents(tmp_path / "m.gguf").tensors["w.weight"]
        )
    same = (found.view(torch.int32) == expected.view(torch.int32)) | expected.isnan()
    assert found.shape == expected.shape == (rows, columns)
    assert same.all() and torch.equal(found.isnan(), expected.isnan())


def test_a_copy_without_words_says_how_many_there_were(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_bos_token_id(1)
    writer.add_tensor("w.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path, copy = tmp_path / "m.gguf", tmp_path / "copy.gguf"
    contents = read_contents(path)
    for tensors in (True, False):
        copy_without_words(path, contents, copy, tensors=tensors)
        reader = GGUFReader(copy)
        assert reader.fields["llama.vocab_size"].contents() == 3
        assert reader.fields["tokenizer.ggml.bos_token_id"].contents() == 1
        assert not {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"} & reader.fields.keys()
        assert np.array_equal(
            reader.tensors[0].data, np.arange(6).reshape(2, 3) if tensors else np.zeros((2, 3))
        )


def test_a_damaged_file_is_refused_wherever_it_ends(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", layers=1))
    whole = path.read_bytes()
    contents = read_contents(path)
    for end in (7, 30, contents.table.start - 1, contents.table.stop - 1):
        path.write_bytes(whole[:end])
        with pytest.raises((ValueError, struct.error)):
            read_contents(path)
    last = max(contents.tensors.values(), key=lambda tensor: tensor.start)
    path.write_bytes(whole[: last.start + 1])
    with pytest.raises(ValueError, match="ends before"):
        read_tensor(path, last)


@pytest.mark.parametrize("version", [struct.pack("<I", 1), struct.pack(">I", 3)])
def test_files_of_another_version_or_byte_order_are_refused(version, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + version + bytes(64))
    with pytest.raises(InputError, match="big-endian or of version 1"):
        read_contents(path)
