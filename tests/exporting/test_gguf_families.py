"""`.gguf` files of every family: what their loaders take for granted, and what is refused."""

import numpy as np
import pytest
import torch
from adapters import logits
from exported import CARRIED, FULL, ROPES, carried, export, without
from gguf import GGUFReader, dequantize
from tiny import tiny_model

from fastprune.errors import InputError
from fastprune.exporting.gguf_architectures import ARCHITECTURES
from fastprune.models.conform import conform
from fastprune.models.experts import apart, together
from fastprune.models.families import FAMILIES, geometries
from fastprune.models.gguf import pair_neighbours
from fastprune.models.load import load_model

READ = ("gemma2", "gemma3_text", "phi3", "stablelm", "stablelm-parallel")
"""Models whose files are read by their settings alone, as those of Llamas are."""


NEVER_TIED = ("stablelm", "stablelm-parallel")
"""Those of them whose files always hold a head, so that they are read as models that have one."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def content(path):
    """The settings and the tensors of a file, by name."""
    reader = GGUFReader(path)
    settings = {key: field.contents() for key, field in reader.fields.items()}
    return settings, {tensor.name: tensor.data for tensor in reader.tensors}


def exported(path, model, **options):
    export(model, path / "m.gguf", **options)
    return content(path / "m.gguf")


@pytest.mark.parametrize("name", CARRIED)
def test_every_family_has_an_architecture(tmp_path, name):
    model = carried(name)
    written = export(model, tmp_path / "m.gguf")
    assert written["architecture"] == ARCHITECTURES[name.partition("-")[0]].name
    assert written["logits_difference"] < 1e-5
    assert written["notes"] == []


def test_no_family_is_left_out():
    assert ARCHITECTURES.keys() == FAMILIES.keys() == {name.partition("-")[0] for name in CARRIED}


@pytest.mark.parametrize("name", READ)
def test_files_are_read_by_their_settings(tmp_path, name):
    model = carried(name, tied=name not in NEVER_TIED)
    export(model, tmp_path / "m.gguf")
    read, _ = load_model(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "granite",
            {"logits_scaling": 2},
            {
                "attention.scale": 0.2,
                "embedding_scale": 3.0,
                "logit_scale": 2.0,
                "residual_scale": 0.6,
            },
        ),
        ("cohere", {}, {"logit_scale": 0.3, "attention.layer_norm_epsilon": 1e-5}),
        ("cohere2", {}, {"attention.sliding_window": 16, "context_length": 512}),
        (
            "gemma2",
            {},
            {
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 5.0,
                "attention.sliding_window": 16,
            },
        ),
        ("gemma3_text", {}, {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4}),
        ("stablelm", {}, {"rope.dimension_count": 4, "use_parallel_residual": False}),
        ("starcoder2", {"sliding_window": 128}, {"context_length": 128}),
        (
            "mixtral",
            {},
            {"expert_count": 6, "expert_used_count": 2, "feed_forward_length": 32},
        ),
        (
            "qwen2_moe",
            {},
            {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48},
        ),
    ],
)
def test_settings(tmp_path, name, options, expected):
    settings, _ = exported(tmp_path, carried(name, **options))
    prefix = ARCHITECTURES[name].name
    found = {key: settings[f"{prefix}.{key}"] for key in expected}
    assert found == pytest.approx(expected)
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in expected.items()
    }


def test_weights_of_gemmas_norms_are_what_is_multiplied_with(tmp_path):
    model = carried("gemma3_text")
    _, tensors = exported(tmp_path, model)
    layer = model.model.layers[2]
    for name, module in (
        ("blk.2.attn_norm", layer.input_layernorm),
        ("blk.2.post_attention_norm", layer.post_attention_layernorm),
        ("blk.2.ffn_norm", layer.pre_feedforward_layernorm),
        ("blk.2.post_ffw_norm", layer.post_feedforward_layernorm),
        ("blk.2.attn_k_norm", layer.self_attn.k_norm),
        ("output_norm", model.model.norm),
    ):
        np.testing.assert_array_equal(tensors[f"{name}.weight"], module.weight.detach() + 1)


def test_norms_in_half_precision_are_not_rounded_again(tmp_path):
    model = carried("gemma").to(torch.bfloat16)
    _, tensors = exported(tmp_path, model, quant="bf16")
    expected = model.model.norm.weight.detach().float() + 1
    np.testing.assert_array_equal(tensors["output_norm.weight"], expected)


@pytest.mark.parametrize(
    ("name", "paired"),
    [("granite", True), ("smollm3", True), ("mixtral", True), ("cohere", False), ("olmo2", False)],
)
def test_the_order_of_a_heads_values(tmp_path, name, paired):
    model = carried(name)
    _, tensors = exported(tmp_path, model)
    weight = model.model.layers[1].self_attn.q_proj.weight.detach()
    expected = pair_neighbours(weight, 16) if paired else weight
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"], expected)


def test_experts_are_three_tensors_and_routers_stay_exact(tmp_path):
    model = carried("qwen2_moe", shared_expert_intermediate_size=64)
    export(model, tmp_path / "m.gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    experts = model.model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, 1)
    for short, weight in (("gate", gate), ("up", up), ("down", experts.down_proj)):
        found = tensors[f"blk.0.ffn_{short}_exps.weight"]
        assert found.tensor_type.name == "Q8_0"
        assert found.shape.tolist() == list(weight.shape)[::-1]
    for short in ("ffn_gate_inp", "ffn_gate_inp_shexp"):
        assert tensors[f"blk.0.{short}.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.ffn_gate_inp_shexp.weight"].shape.tolist() == [64]


def test_parts_of_experts_go_together_again():
    state = {
        "mlp.experts.gate_up_proj": torch.rand(3, 8, 5),
        "mlp.experts.down_proj": torch.rand(3, 5, 4),
        "mlp.gate.weight": torch.rand(3, 5),
    }
    parts = {}
    for name, tensor in state.items():
        parts |= apart(name, tensor) or {name: tensor}
    assert len(parts) == 4
    found = together(parts)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["phi3", "mixtral", "starcoder2"])
def test_channels_are_padded_where_they_lie(tmp_path, name):
    model = carried(name, intermediate_size=40)
    written = export(model, tmp_path / "m.gguf", "q8_0", pad=True)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    gate_and_up = {
        "phi3": ["ffn_up"],
        "mixtral": ["ffn_gate_exps", "ffn_up_exps"],
        "starcoder2": ["ffn_up"],
    }[name]
    for short in gate_and_up:
        found = tensors[f"blk.1.{short}.weight"]
        weight = dequantize(found.data, found.tensor_type).reshape(*found.shape[::-1])
        parts = np.split(weight, weight.shape[-2] // 64, axis=-2)
        assert all(part[..., :40, :].any() and not part[..., 40:, :].any() for part in parts)
    # q8_0 rounds to 1/127 of the largest of 32 weights, and random models feel it
    assert written["logits_difference"] < 0.3


def test_a_head_of_its_own_where_the_loader_wants_one(tmp_path):
    model = carried("stablelm", tied=True)
    _, tensors = exported(tmp_path, model)
    np.testing.assert_array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_a_model_with_layers_of_its_own_class(tmp_path):
    model = carried("gemma3_text")
    conform(model, geometries(model))
    assert export(model, tmp_path / "m.gguf")["architecture"] == "gemma3"


def test_layers_of_which_nothing_is_left_are_dropped(tmp_path):
    settings, tensors = exported(tmp_path, without([1], [1], "phi3", **FULL))
    assert settings["phi3.block_count"] == 3
    assert "blk.2.attn_qkv.weight" in tensors
    assert "blk.3.attn_qkv.weight" not in tensors


WINDOW_BASE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: carried("gemma", tied=False), "tie_word_embeddings True, and the model has False"),
        (lambda: carried("gemma", hidden_act="silu"), "gelu_pytorch_tanh, and the model has silu"),
        (lambda: carried("gemma2", query_pre_attn_scalar=20), "query_pre_attn_scalar 16, and"),
        (lambda: carried("gemma2", attn_logit_softcapping=None), "some attn_logit_softcapping"),
        (lambda: carried("gemma3_text", rope_parameters=WINDOW_BASE), "with a sliding window"),
        (lambda: carried("gemma3_text", layer_types=["full_attention"] * 7), "one layer of 6"),
        (lambda: carried("smollm3", no_rope_layers=[1, 1, 1, 1]), "one layer of 4"),
        (lambda: without([1], [1], "cohere2", **FULL), "one layer of 4.*removing whole layers"),
        (lambda: without([1], [], "granite"), "layers of a granite that differ.*--layout uniform"),
        (lambda: tiny_model("starcoder2"), "query heads that fill the hidden size of 64.*8 of 16"),
        (lambda: tiny_model("olmoe"), "KV heads that fill the hidden size"),
        (lambda: carried("starcoder2", use_bias=False), "use_bias True"),
        (lambda: carried("olmo2", attention_bias=True), r"olmo2 has no place for .*q_proj\.bias"),
        (
            lambda: carried("olmo2", rope_parameters=ROPES["llama3"] | {"rope_theta": 10000.0}),
            "llama3 rotary scaling in the architecture olmo2",
        ),
        (lambda: tiny_model("qwen3_moe"), "experts in every layer, and the model has an MLP"),
        (lambda: carried("olmoe", norm_topk_prob=True), "norm_topk_prob False"),
        (lambda: carried("olmoe", clip_qkv=8.0), "clip_qkv None"),
    ],
)
def test_what_loaders_compute_otherwise_is_refused(tmp_path, model, message):
    with pytest.raises(InputError, match=message) as error:
        export(model(), tmp_path / "m.gguf")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_no_padding_makes_whole_are_refused(tmp_path):
    model = carried("qwen2_moe", shared_expert_intermediate_size=48)
    message = r"blk\.0\.ffn_down_shexp\.weight has rows of 48.*multiples of 32; choose --quant f16"
    with pytest.raises(InputError, match=message):
        export(model, tmp_path / "m.gguf", "q8_0", pad=True)
    assert list(tmp_path.iterdir()) == []
