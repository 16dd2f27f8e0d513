"""Adapters as plain peft makes them, of every kind: merged or unmerged they compute what peft did,
or are refused by name."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from adapters import logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import saved, tiny_gpt2, tiny_model, tiny_tokenizer

from fastprune.errors import InputError
from fastprune.models.load import load_model
from fastprune.models.quiet import quiet_libraries
from fastprune.recover.lora import TARGETS
from fastprune.recover.merge import MergeConfig, run_merge

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
ENDS = {"modules_to_save": ["embed_tokens", "lm_head"]}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 2}},
    "pissa": {"init_lora_weights": "pissa"},
    "biases": {"bias": "all"},
    "own head": {"modules_to_save": ["lm_head"]},
    "own embeddings": {"modules_to_save": ["embed_tokens"]},
    "own both": ENDS,
    "own, kept tied": {**ENDS, "ensure_weight_tying": True},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
    "embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
    "both": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
}
STAYS_TIED = {*list(KINDS)[:6], "own, kept tied", "tokens"}


def made(path, model, *, vocabulary=None, **settings):
    """The base, an adapter of random weights on it, and what peft computes with the two."""
    base = saved(path / "base", model)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    with quiet_libraries():
        adapted = get_peft_model(model, LoraConfig(**deepcopy(options | settings)))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                if "magnitude" in name:
                    parameter.mul_(1.1)
                else:
                    parameter.normal_(std=0.2)
    with quiet_libraries():
        adapted.save_pretrained(path / "adapter")
    return base, path / "adapter", logits(adapted.eval())


def merged(base: Path, adapter: Path, **changes):
    out = base.parent / "out"
    run_merge(MergeConfig(model=str(base), adapter=adapter, out=out, **changes))
    return load_model(out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_computes_what_peft_did(tmp_path, kind, tied):
    model = tiny_model("qwen2" if kind == "biases" else "llama", tied=tied, layers=2)
    base, adapter, expected = made(tmp_path, model, **KINDS[kind])
    # the same fp32 terms in another order, logits of order 10
    close = {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits(load_model(base, adapter=adapter)[0]), expected, **close)
    written, _ = merged(base, adapter)
    torch.testing.assert_close(logits(written), expected, **close)
    assert written.config.tie_word_embeddings == (tied and kind in STAYS_TIED)


def test_a_head_of_its_own_over_the_tied_embeddings_of_another_family(tmp_path):
    base, adapter, expected = made(
        tmp_path, tiny_gpt2(), target_modules=["c_attn", "wte"], fan_in_fan_out=True
    )
    torch.testing.assert_close(logits(merged(base, adapter)[0]), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("tied", "settings"), [
    (True, KINDS["own both"]), (False, KINDS["own both"]), (False, KINDS["both"]),
    (True, KINDS["embeddings"]),
])  # fmt: skip
def test_a_larger_vocabulary_comes_with_the_adapter(tmp_path, tied, settings):
    model = tiny_model("llama", tied=tied, layers=2)
    base, adapter, expected = made(tmp_path, model, vocabulary=304, **settings)
    tokenizer = tiny_tokenizer().__class__.from_pretrained(base)
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.save_pretrained(adapter)
    written, words = merged(base, adapter)
    torch.testing.assert_close(logits(written), expected, atol=2e-4, rtol=1e-4)
    assert written.config.vocab_size == 304
    assert "<call>" in words.get_vocab()


@pytest.mark.parametrize("settings", [KINDS["own head"], KINDS["own embeddings"]])
def test_half_a_larger_vocabulary_is_refused(tmp_path, settings):
    model = tiny_model("llama", tied=False, layers=2)
    base, adapter, _ = made(tmp_path, model, vocabulary=304, **settings)
    with pytest.raises(InputError, match=r"a vocabulary of 304 tokens .* MODEL has 300"):
        merged(base, adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rename", "told"), [
    (lambda name: name.replace(".weight", ".default.weight"), "adapter's own name is left in"),
    (lambda name: name.replace("model.layers", "_orig_mod.model.layers"), "compiled model"),
    (lambda name: f"module.{name}", "wrapped for several processes"),
    (lambda name: name.removeprefix("base_model.model."), "they lack the base_model.model."),
    (lambda name: name.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"),
     "MLX's"),
    (lambda name: f"lora_unet_{name}", "an image model"),
])  # fmt: skip
def test_names_of_other_tools_are_told(tmp_path, rename, told):
    base, adapter, _ = made(tmp_path, tiny_model("llama", layers=2))
    tensors = load_file(adapter / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(InputError, match=told):
        merged(base, adapter)


def test_an_adapter_without_tensors_is_told(tmp_path):
    base, adapter, _ = made(tmp_path, tiny_model("llama", layers=2))
    (adapter / WEIGHTS).unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="holds no tensors"):
        merged(base, adapter)


@pytest.mark.parametrize(("value", "told"), [(None, False), (0.5, True)])
def test_settings_of_a_newer_peft_are_told_where_they_are_set(tmp_path, caplog, value, told):
    base, adapter, expected = made(tmp_path, tiny_model("llama", layers=2))
    settings = json.loads((adapter / SETTINGS).read_text()) | {"some_future_option": value}
    (adapter / SETTINGS).write_text(json.dumps(settings))
    torch.testing.assert_close(logits(merged(base, adapter)[0]), expected, atol=2e-4, rtol=1e-4)
    assert ("some_future_option" in caplog.text) == told


@pytest.mark.parametrize("kind", ["own head", "tokens", "biases"])
def test_a_part_of_what_replaces_weights_is_refused(tmp_path, kind):
    model = tiny_model("qwen2" if kind == "biases" else "llama", layers=2)
    base, adapter, _ = made(tmp_path, model, **KINDS[kind])
    with pytest.raises(InputError, match=r"--strength 0\.5 scales low-rank matrices"):
        merged(base, adapter, strength=0.5)
