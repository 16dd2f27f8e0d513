"""Files that engines with the keys of transformers 4 read."""

import json
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer

from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.portable import older_config_keys, older_tokenizer_keys

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_plain_rope_has_a_base_and_no_scaling() -> None:
    found = older_config_keys(
        {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] is None
    assert found["torch_dtype"] == "bfloat16"


def test_scaled_rope_keeps_its_fields() -> None:
    found = older_config_keys({"rope_parameters": YARN})
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def test_the_share_of_a_head_that_turns_is_beside_the_scaling(tmp_path: Path) -> None:
    found = older_config_keys({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}})
    assert found["partial_rotary_factor"] == 0.5
    assert found["rope_scaling"] == older_config_keys({"rope_parameters": YARN})["rope_scaling"]
    model = tiny_model("stablelm", partial_rotary_factor=0.5)
    save_checkpoint(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["partial_rotary_factor"] == 0.5
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == model.config.rope_parameters


def test_a_rope_for_each_kind_of_layer_is_left_alone() -> None:
    nested = {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}
    assert older_config_keys(nested) == nested


def test_tokenizer_class_and_extra_tokens_by_their_older_names() -> None:
    found = older_tokenizer_keys(
        {
            "tokenizer_class": "TokenizersBackend",
            "extra_special_tokens": ["<a>"],
            "is_local": True,
            "eos_token": "</s>",
        }
    )
    assert found == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "</s>",
    }
    assert older_tokenizer_keys({"tokenizer_class": "Qwen2Tokenizer"}) == {
        "tokenizer_class": "Qwen2Tokenizer"
    }


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, YARN])
def test_both_spellings_lie_side_by_side_and_this_release_reads_its_own(
    rope: dict, tmp_path: Path
) -> None:
    model = tiny_model("llama", rope_parameters=dict(rope))
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["torch_dtype"] == written["dtype"] == "float32"
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == model.config.rope_parameters
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the mill")["input_ids"] == tiny_tokenizer()("the mill")["input_ids"]
