"""What is written is the model in memory, or it is refused."""

import json
from pathlib import Path

import pytest
import torch
from tiny import saved, tiny_gpt2, tiny_model, tiny_t5, tiny_tokenizer, token_ids
from torch import nn
from transformers import GenerationConfig

from fastprune.errors import InputError
from fastprune.inspect.perplexity import evaluate_layers
from fastprune.models.checkpoint import check_savable, save_checkpoint
from fastprune.models.load import load_model
from fastprune.models.readback import ReadBackError, check_read_back
from fastprune.models.streamed import StreamedModel
from fastprune.precision import convert_weights


def with_own_head(family: str = "llama") -> nn.Module:
    """A model whose config says tied, over an embedding and a head that differ."""
    model = tiny_model(family, tied=False)
    model.config.tie_word_embeddings = True
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2, tiny_t5])
def test_a_sound_result_passes(make, tmp_path: Path) -> None:
    model = make("llama") if make is tiny_model else make()
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    check_read_back(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_weight_is_noticed(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama")
    convert_weights(model, dtype)
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    check_read_back(model, tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] *= 3
    with pytest.raises(ReadBackError, match="another model"):
        check_read_back(model, tmp_path)


def test_another_rope_is_noticed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReadBackError, match="another model"):
        check_read_back(model, tmp_path)


def test_a_result_that_does_not_load_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ReadBackError, match="does not load again"):
        check_read_back(model, tmp_path)
    assert ReadBackError.exit_status == 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(family: str, tmp_path: Path) -> None:
    model = with_own_head(family)
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    read, _ = load_model(tmp_path)
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=0)


def test_equal_matrices_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    check_read_back(model, tmp_path)


def test_one_tensor_that_the_config_calls_two_is_written_once(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    check_read_back(model, tmp_path)


def test_a_streamed_model_reads_a_head_of_its_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, with_own_head())
    model, _ = load_model(folder)
    assert not model.config.tie_word_embeddings
    streamed = StreamedModel(folder)
    assert not streamed.model.config.tie_word_embeddings
    with torch.no_grad():
        labels = token_ids(2, 32)
        loss = model(labels, labels=labels).loss
    found = evaluate_layers(streamed, labels).perplexity
    assert found == pytest.approx(loss.exp().item(), rel=1e-4)


def test_inconsistent_generation_settings_are_written_as_they_came(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=0)
    model.generation_config.temperature = 0.9  # refused by the writer of some releases
    check_savable(model, tiny_tokenizer())
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["temperature"] == 0.9
    assert written["eos_token_id"] == 0


def test_what_cannot_be_saved_is_refused_before_the_work() -> None:
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            raise ValueError("a merge without a token")

    with pytest.raises(InputError, match="a merge without a token"):
        check_savable(tiny_model("llama"), Broken())
