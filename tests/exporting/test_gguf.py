"""`.gguf` files: what is in them, what they read back as, and what cannot be one."""

import json

import numpy as np
import pytest
import torch
from adapters import logits, per_layer_model
from exported import DIGITS, LONGROPE, ROPES, TRICKY, export, llama, split, without, words_like
from gguf import GGUFReader
from gguf_files import gguf_tensors
from sentencepiece_words import sentencepiece_tokenizer
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_gpt2, tiny_model
from tokenizers import pre_tokenizers

from fastprune import cli
from fastprune.errors import InputError
from fastprune.exporting import gguf as writer
from fastprune.exporting.gguf_types import quants
from fastprune.models.families import geometries
from fastprune.models.gguf_words import LLAMA3, QWEN2, TEKKEN
from fastprune.models.load import load_model
from fastprune.models.readback import ReadBackError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fields(path):
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def check_same(path, model, tolerance=1e-4):
    read, _ = load_model(path)
    torch.testing.assert_close(logits(read), logits(model), rtol=tolerance, atol=tolerance)
    return read


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_as_its_own_architecture(tmp_path, family, tied):
    model = tiny_model(family, tied=tied, hidden_size=128)  # as wide as its heads are together
    written = export(model, tmp_path / "m.gguf")
    assert written["architecture"] == ("llama" if family == "mistral" else family)
    expected = gguf_tensors(model)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.data, expected[name])
    check_same(tmp_path / "m.gguf", model)


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_layers_that_differ_are_deci(tmp_path, family, options):
    model = per_layer_model(family, **(options if family == "llama" else {}))
    written = export(model, tmp_path / "m.gguf")
    assert written["architecture"] == "deci"
    assert written["notes"] == ["1 layers hold zeros in place of a removed sublayer"]
    found = fields(tmp_path / "m.gguf")
    assert found["deci.attention.head_count"] == [8, 0, 4, 8]
    assert found["deci.attention.head_count_kv"] == [4, 0, 2, 4]
    assert found["deci.feed_forward_length"] == [32, 64, 50, 32]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 16
    read = check_same(tmp_path / "m.gguf", model)
    assert geometries(read) == geometries(model)


@pytest.mark.parametrize(
    ("attention", "mlp", "heads", "widths"),
    [
        ([0], [], [2, 8, 8, 8], [96, 96, 96, 96]),
        ([2], [3], [8, 8, 0, 8], [96, 96, 96, 32]),
        ([3], [0], [8, 8, 8, 0], [32, 96, 96, 96]),
        ([1, 2], [1], [8, 0, 8], [96, 96, 96]),
    ],
)
def test_what_the_loader_of_deci_needs_is_zeros(tmp_path, attention, mlp, heads, widths):
    model = without(attention, mlp)
    export(model, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["deci.attention.head_count"] == heads
    assert found["deci.feed_forward_length"] == widths
    check_same(tmp_path / "m.gguf", model)


def test_layers_of_which_nothing_is_left_are_dropped(tmp_path):
    model = without([1, 3], [1, 3])
    assert export(model, tmp_path / "m.gguf")["architecture"] == "llama"
    assert fields(tmp_path / "m.gguf")["llama.block_count"] == 2
    check_same(tmp_path / "m.gguf", model)


def test_a_qwen2_whose_heads_are_not_as_wide_as_the_model_is_deci(tmp_path):
    model = tiny_model("qwen2")
    assert export(model, tmp_path / "m.gguf")["architecture"] == "deci"
    check_same(tmp_path / "m.gguf", model)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("make", [tiny_model, per_layer_model], ids=["uniform", "per-layer"])
def test_scaled_rotary_embeddings(tmp_path, kind, make):
    model = make("llama", rope_parameters=ROPES[kind] | {"rope_theta": 500000.0})
    export(model, tmp_path / "m.gguf")
    read = check_same(tmp_path / "m.gguf", model)
    assert read.config.rope_parameters["rope_type"] == kind


def test_factors_of_longrope(tmp_path):
    model = llama(rope_parameters=LONGROPE | {"rope_theta": 10000.0})
    export(model, tmp_path / "m.gguf")
    check_same(tmp_path / "m.gguf", model)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    np.testing.assert_allclose(tensors["rope_factors_long.weight"], LONGROPE["long_factor"])
    np.testing.assert_allclose(tensors["rope_factors_short.weight"], LONGROPE["short_factor"])
    found = fields(tmp_path / "m.gguf")
    assert found["llama.rope.scaling.original_context_length"] == 128
    assert found["llama.rope.scaling.attn_factor"] == pytest.approx(
        (1 + np.log(4) / np.log(128)) ** 0.5
    )


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_types(tmp_path, quant):
    model = llama()
    written = export(model, tmp_path / "m.gguf", quant)
    kinds = {t.name: t.tensor_type.name.lower() for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == quant
    assert kinds["blk.0.ffn_norm.weight"] == "f32"
    assert kinds["token_embd.weight"] == ("q8_0" if quant.startswith(("q4", "q5")) else quant)
    assert 0 < written["logits_difference"] < 0.9


def test_what_gguf_can_quantise_is_offered():
    assert {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"} <= quants().keys()
    assert not {"q4_k", "i8", "f64"} & quants().keys()


def test_padding_adds_zeros_and_changes_nothing(tmp_path):
    model = per_layer_model()
    with pytest.raises(InputError, match=r"layer 2 has 50 channels.*multiples of 32.*--align 32"):
        export(model, tmp_path / "m.gguf", "q8_0")
    written = export(model, tmp_path / "m.gguf", "q8_0", pad=True)
    assert written["notes"][0] == "1 layers are padded with zeros to the widths the type needs"
    read, _ = load_model(tmp_path / "m.gguf")
    assert geometries(read)[2].channels == 64
    rounded = dict(read.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = tuple(slice(n) for n in parameter.shape)
            parameter.copy_(rounded[name][rows])
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)


def test_heads_are_padded_by_whole_groups(tmp_path):
    model = tiny_model("mistral", num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(InputError, match=r"heads of 3 × 16 values.*--quant f16"):
        export(model, tmp_path / "m.gguf", "q8_0")
    export(model, tmp_path / "m.gguf", "q8_0", pad=True)
    read, _ = load_model(tmp_path / "m.gguf")
    assert geometries(read)[0].kv_heads == 4


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: per_layer_model("qwen3"), {}, "--layout uniform"),
        (lambda: without([0, 1, 2, 3]), {}, "no attention left"),
        (tiny_gpt2, {}, "a gpt2 cannot be exported as gguf"),
        (llama, {"quant": "q4_k"}, "--quant q4_k: not one of f32"),
        (llama, {"quant": "tq1_0"}, "multiples of 256.*hidden size is 64"),
        (lambda: llama(hidden_act="gelu"), {}, "the model has gelu"),
        (
            lambda: tiny_model("qwen3", attention_bias=True),
            {},
            r"qwen3 has no place for model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda: tiny_model("qwen3", rope_parameters=ROPES["llama3"] | {"rope_theta": 10000.0}),
            {},
            "llama3 rotary scaling in the architecture qwen3",
        ),
        (
            lambda: llama(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
            ),
            {},
            "dynamic rotary scaling",
        ),
        (
            lambda: llama(
                rope_parameters=ROPES["yarn"] | {"rope_theta": 1e4, "attention_factor": 3.0}
            ),
            {},
            "yarn rotary scaling with an attention factor",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(tmp_path, model, options, message):
    with pytest.raises(InputError, match=message) as error:
        export(model(), tmp_path / "m.gguf", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_f16_are_refused(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds values beyond.*bf16"):
        export(model, tmp_path / "m.gguf", "f16")
    export(model, tmp_path / "m.gguf", "bf16", read_back=False)


def test_a_sliding_window_bounds_the_context(tmp_path):
    model = tiny_model("mistral", sliding_window=128)
    written = export(model, tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 128
    assert "the context is 128 tokens, not 512" in written["notes"][0]


# ---------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "ignore_merges"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        ("smollm", DIGITS, False),
        ("llama-bpe", split(LLAMA3), True),
        ("smaug-bpe", split(LLAMA3), False),
        ("qwen2", split(QWEN2), False),
        ("tekken", split(TEKKEN), True),
    ],
)
def test_rules_that_cut_texts_by_their_names(tmp_path, name, pre_tokenizer, ignore_merges):
    tokenizer = words_like(pre_tokenizer, ignore_merges)
    export(llama(), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name
    _, read = load_model(tmp_path / "m.gguf")
    assert read(TRICKY)["input_ids"] == tokenizer(TRICKY)["input_ids"]
    assert read.decode(read(TRICKY)["input_ids"]) == tokenizer.decode(
        tokenizer(TRICKY)["input_ids"]
    )


def test_other_rules_are_refused(tmp_path):
    tokenizer = words_like(pre_tokenizers.Whitespace())
    with pytest.raises(InputError, match=r"rules that llama\.cpp has no name for"):
        export(llama(), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_their_kinds(tmp_path):
    tokenizer = words_like(DIGITS)
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.add_tokens(["madder"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}<turn>"
    model = llama(vocab_size=310)
    model.generation_config.eos_token_id = [0, 300]
    export(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    found = fields(tmp_path / "m.gguf")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 310
    assert (tokens[0], kinds[0]) == ("<|end|>", 3)
    assert (tokens[300], kinds[300]) == ("<turn>", 3)
    assert (tokens[301], kinds[301]) == ("madder", 4)
    assert (tokens[302], kinds[302]) == ("[PAD302]", 5)
    assert kinds[1] == 1
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.eot_token_id"] == 300
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    _, read = load_model(tmp_path / "m.gguf")
    assert read("madder <turn>")["input_ids"] == tokenizer("madder <turn>")["input_ids"]
    assert read.chat_template == tokenizer.chat_template


def test_more_tokens_than_rows_are_refused(tmp_path):
    tokenizer = words_like(DIGITS)
    tokenizer.add_tokens(["madder"])
    with pytest.raises(InputError, match="301 tokens and the model's embedding 300 rows"):
        export(llama(), tmp_path / "m.gguf", tokenizer=tokenizer)


def test_sentencepiece(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    model = llama(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    export(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    _, read = load_model(tmp_path / "m.gguf")
    for text in (TEXT, "a½ 12 é\n\nx"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


# ----------------------------------------------------------------------------------- the command


def test_the_file_comes_to_its_place_or_not_at_all(tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "model")
    out = tmp_path / "m.gguf"
    arguments = ["export", str(model), "--format", "gguf", "--out", str(out), "--quiet"]
    assert cli.main(arguments) == 0
    first = out.read_bytes()
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--overwrite", "--quant", "q8_0"]) == 0
    second = out.read_bytes()
    assert len(second) < len(first)

    monkeypatch.setattr(writer, "logits_difference", lambda *_: 0.95)
    with pytest.raises(ReadBackError, match="reads back as another model"):
        export(llama(), out, overwrite=True)
    assert out.read_bytes() == second
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "m.gguf", "cache"}


def test_only_files_of_ours_are_replaced(tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "model")
    out = tmp_path / "theirs.gguf"
    out.write_bytes(b"GGUF" + b"x" * 100)
    arguments = ["export", str(model), "--format", "gguf", "--out", str(out), "--overwrite"]
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "not a file that fastprune wrote" in capsys.readouterr().err
    arguments[5] = str(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    assert cli.main(arguments) == 2
    assert "is a folder; --out names a file" in capsys.readouterr().err


def test_beside_other_formats(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    out, file = tmp_path / "out", tmp_path / "result.json"
    flags = ["--format", "hf,gguf", "--out", str(out), "--quiet", "--json", str(file)]
    assert cli.main(["export", str(model), *flags]) == 0
    written = json.loads(file.read_text())["written"]
    assert written["gguf"]["file"] == "model.gguf"
    ours, theirs = load_model(out / "hf")[0], load_model(out / "model.gguf")[0]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-2, atol=1e-1)
