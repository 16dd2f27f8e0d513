"""Files of a model that describe what cannot be are refused, and the error names the file."""

import json
import struct

import pytest
import torch
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

from fastprune.data import instruct
from fastprune.data.checks import Unusable
from fastprune.errors import InputError
from fastprune.inspect.generate import generate
from fastprune.models.adapter import BASE_FILE, CONFIG_FILE, check_adapter, read_fingerprint
from fastprune.models.load import load_config, load_model
from fastprune.models.shards import ShardReader, listed_files
from fastprune.models.skeleton import skeleton

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", "int64", "complex64"])
def test_a_dtype_that_nothing_is_computed_in(tmp_path, dtype):
    file = tiny_checkpoint(tmp_path, layers=1) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
    for read in (load_config, load_model):
        with pytest.raises(InputError, match=f"config.json: its dtype is {dtype}, not one of"):
            read(tmp_path)


@pytest.mark.parametrize("count", [2**64, 1e300])
def test_more_layers_than_any_model_has(tmp_path, count):
    file = tiny_checkpoint(tmp_path, layers=1) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": count}))
    with pytest.raises(InputError, match="num_hidden_layers is"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"vocab_size": -1}, {"intermediate_size": -(2**63)}, {"rope_parameters": {"rope_type": {}}}],
)
def test_a_config_that_describes_no_model(tmp_path, wrong):
    file = tiny_checkpoint(tmp_path, layers=1) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(InputError):
        skeleton(load_config(tmp_path), torch.float32)


def test_a_dtype_that_is_no_name(tmp_path):
    header = json.dumps({"a": {"dtype": True, "shape": [4], "data_offsets": [0, 16]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="truncated or corrupt weight file"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([-2, -2], [0, 16]), ([2.0, 2], [0, 16]), (["2"], [0, 16]), ([4], [0.0, 16]), (3, [0, 16])],
)
def test_a_shape_or_a_place_that_is_none(tmp_path, shape, offsets):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    header = json.dumps({"a": entry}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="truncated or corrupt weight file"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", 3, None, ["a"]])
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputError, match=r"broken index|outside of its folder"):
        listed_files(index)


@pytest.mark.parametrize("rank", [None, 0, -1, True, "8", 10**9])
def test_an_adapter_of_an_impossible_rank(tmp_path, rank):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    with pytest.raises(InputError, match="the rank r must be a whole number"):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"layers": 3}, {"layers": [["x"]]}, {"digests": []}, {"parameters": "1"}, {"base": [1]}],
)
def test_a_fingerprint_of_other_types(tmp_path, change):
    sound = {"base": "m", "parameters": 1, "layers": [[1]], "dtype": "float32", "digests": {}}
    (tmp_path / BASE_FILE).write_text(json.dumps(sound))
    assert read_fingerprint(tmp_path).base == "m"
    (tmp_path / BASE_FILE).write_text(json.dumps(sound | change))
    with pytest.raises(InputError, match="broken"):
        read_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "long"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '\\ud800' }}", "surrogates"),
    ],
)
def test_a_chat_template_that_fails_or_does_not_end(monkeypatch, template, words):
    if template == ENDLESS:
        monkeypatch.setattr(instruct, "TEMPLATE_SECONDS", 0.2)
    tokenizer = instruct.with_template(tiny_tokenizer())
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(Unusable) as caught:
        instruct.apply_template(tokenizer, messages, chat_template=template, tokenize=False)
    assert words in caught.value.reason


def test_a_prompt_of_no_tokens():
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(tiny_model("llama", layers=1), tiny_tokenizer(), [], 2)


def test_generation_settings_that_are_wrong_or_want_the_tokenizer():
    model = tiny_model("llama", layers=1)
    model.generation_config.stop_strings = ["river"]
    assert generate(model, tiny_tokenizer(), "The", 2).new_tokens == 2
    model.generation_config.eos_token_id = ["x"]
    with pytest.raises(InputError, match=r"generation_config.json: broken"):
        generate(model, tiny_tokenizer(), "The", 2)
