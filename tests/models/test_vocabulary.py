"""Rows of embedding and head that are cut, and the token ids that follow them."""

from __future__ import annotations

import pytest
import torch
from composite import IMAGE, MULTIMODAL, tiny_multimodal, with_image
from sentencepiece_words import sentencepiece_tokenizer
from tiny import EVERY_FAMILY, TEXT, VOCABULARY, tiny_model, tiny_tokenizer
from torch import nn
from transformers import GenerationConfig

from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.load import load_model
from fastprune.models.multimodal import text_part
from fastprune.models.trimming import Trimmer
from fastprune.models.vocabulary import keep_rows, settings_ids, take_tokens

KEPT = [0, 2, 3, *range(10, 200, 3)]


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_cut_model_computes_the_logits_of_the_rows_it_keeps(family, tied, tmp_path):
    model = tiny_model(family, tied=tied, layers=2)
    new = torch.randint(len(KEPT), (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(model, torch.tensor(KEPT)[new])[..., KEPT]
    keep_rows(model, KEPT)
    assert torch.equal(logits(model, new), expected)
    assert len(model.get_output_embeddings().weight) == len(KEPT)
    assert model.config.vocab_size == len(KEPT)

    save_checkpoint(model, None, tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    read, _ = load_model(tmp_path)
    assert torch.allclose(logits(read, new), expected, atol=1e-5)
    shared = read.get_output_embeddings().weight is read.get_input_embeddings().weight
    assert shared == tied


def test_the_bias_of_a_head_is_cut_too():
    model = tiny_model("phi3", tied=False, layers=1)
    head = nn.Linear(64, VOCABULARY)
    model.lm_head = head
    ids = torch.arange(8)[None]
    expected = logits(model, torch.tensor(KEPT)[ids])[..., KEPT]
    keep_rows(model, KEPT)
    assert torch.equal(logits(model, ids), expected)
    assert head.bias.shape == (len(KEPT),)


def test_ids_in_the_settings_are_renumbered():
    model = tiny_model("llama", layers=1)
    model.config.eos_token_id, model.config.pad_token_id = [3, 10], -1
    model.generation_config = GenerationConfig(
        bos_token_id=2,
        eos_token_id=[3, 299],
        pad_token_id=298,
        suppress_tokens=[10, 13],
        bad_words_ids=[[2, 3], [16]],
    )
    assert settings_ids(model) == {0, 2, 3, 10, 13, 16, 298, 299}
    keep_rows(model, KEPT)
    config, generation = model.config, model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [2, 3], -1)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, [2])
    assert generation.pad_token_id is None
    assert generation.suppress_tokens == [3, 4]
    assert generation.bad_words_ids == [[1, 2], [5]]


def test_the_row_that_learns_nothing_stays_the_padding():
    model = tiny_model("llama", layers=1, pad_token_id=3)
    keep_rows(model, KEPT)
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == 2


def test_a_model_takes_the_tokens_of_one_with_fewer():
    whole, model = tiny_tokenizer(), tiny_model("llama", layers=1)
    trimmer = Trimmer(whole)
    kept = sorted(trimmer.closed(whole(TEXT[:60])["input_ids"]))
    small = trimmer.trimmed(kept)
    ids = small(TEXT, return_tensors="pt")["input_ids"]
    expected = logits(model, torch.tensor(kept)[ids])[..., kept]
    assert take_tokens(model, whole, whole)
    assert model.config.vocab_size == VOCABULARY
    assert take_tokens(model, whole, small)
    assert torch.equal(logits(model, ids), expected)

    assert not take_tokens(tiny_model("llama", layers=1), whole, sentencepiece_tokenizer())
    assert not take_tokens(tiny_model("llama", layers=1, vocab_size=100), whole, small)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_decoder_of_a_multimodal_model_is_cut_within_it(kind):
    model, inputs = tiny_multimodal(kind), with_image(kind)
    decoder = text_part(model)
    named = settings_ids(decoder)
    assert IMAGE in named
    kept = sorted({*named, *inputs["input_ids"].flatten().tolist()})
    with torch.no_grad():
        expected = model(**inputs).logits[..., kept]
        keep_rows(decoder, kept)
        new = torch.tensor([[kept.index(number) for number in inputs["input_ids"][0].tolist()]])
        assert torch.allclose(model(**inputs | {"input_ids": new}).logits, expected, atol=1e-5)
    assert model.config.image_token_id == kept.index(IMAGE)
    assert model.config.text_config.vocab_size == len(kept)
