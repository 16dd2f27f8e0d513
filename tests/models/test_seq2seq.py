"""Encoder-decoder models: loaded whole, and one loss for them and for causal ones."""

import math

import pytest
import torch
from tiny import VOCABULARY, saved, tiny_t5, tiny_tokenizer, token_ids
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForConditionalGeneration, MT5Config, UMT5Config
from transformers import MT5ForConditionalGeneration as MT5
from transformers import UMT5ForConditionalGeneration as UMT5

from fastprune.errors import InputError
from fastprune.inspect.generate import chat, generate
from fastprune.inspect.perplexity import evaluate
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.forward import chunked_loss
from fastprune.models.load import load_model
from fastprune.models.seq2seq import halves, response_states

SIZES = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}
SIZES |= {"num_heads": 4, "decoder_start_token_id": 0}


def models():
    untied = tiny_t5()  # T5 1.1: a head of its own, and no scaling before it
    untied.config.scale_decoder_outputs = False
    untied.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 64))
    yield "t5", tiny_t5(feed_forward_proj="relu")
    yield "t5 1.1", untied
    yield "mt5", MT5(MT5Config(**SIZES)).eval()
    yield "umt5", UMT5(UMT5Config(**SIZES)).eval()


@pytest.fixture(params=[pytest.param(m, id=name) for name, m in models()])
def model(request):
    return request.param


def prompts_and_responses():
    prompts, responses = token_ids(3, 12, seed=1), token_ids(3, 9, seed=2)
    mask = torch.ones_like(prompts)
    mask[1, 7:] = 0
    responses[2, 5:] = -100
    return prompts, mask, responses


def test_states_and_labels_give_the_models_own_loss(model):
    prompts, mask, responses = prompts_and_responses()
    with torch.no_grad():
        logits = model(input_ids=prompts, attention_mask=mask, labels=responses).logits
        hidden, labels = response_states(model, prompts, responses, mask)
        total, count = chunked_loss(hidden, model.lm_head, labels)
    expected = cross_entropy(logits.double().flatten(0, 1), responses.flatten(), reduction="sum")
    assert count == int((responses != -100).sum())
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 logits


def test_it_loads_as_it_was_saved(model, tmp_path):
    ids = token_ids()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids, labels=ids).logits, model(ids, labels=ids).logits)
    save_checkpoint(loaded, tiny_tokenizer(), tmp_path / "again")
    again, _ = load_model(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids, labels=ids).logits, model(ids, labels=ids).logits)


def test_perplexity_is_that_of_the_second_halves():
    model, ids = tiny_t5(), token_ids(5, 25)
    prompts, responses = (half.contiguous() for half in halves(ids))
    with torch.no_grad():
        logits = model(input_ids=prompts, labels=responses).logits
    loss = cross_entropy(logits.double().flatten(0, 1), responses.flatten())
    result = evaluate(model, ids, batch_size=2)
    assert math.log(result.perplexity) == pytest.approx(loss.item(), rel=1e-6)  # fp32 logits
    assert (result.tokens, result.seq_len, result.windows) == (5 * 13, 25, 5)


def test_generation_answers_the_prompt_and_its_end():
    model, tokenizer = tiny_t5(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[*tokenizer("The mill").input_ids, tokenizer.eos_token_id]])
    written = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=ids, decoder_input_ids=written).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
    result = generate(model, tokenizer, "The mill", 6)
    assert result.text == tokenizer.decode(written[0, 1:], skip_special_tokens=True)
    assert result.new_tokens == 6


def test_a_chat_asks_the_last_question(capsys):
    model, tokenizer = tiny_t5(), tiny_tokenizer()
    lines = iter(["The river", "The mill", "/exit"])
    chat(model, tokenizer, 4, read=lambda prompt: next(lines))
    expected = generate(model, tokenizer, "The mill", 4).text
    assert capsys.readouterr().out.rstrip().endswith(expected.rstrip())


def test_other_kinds_are_refused(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    config = BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    folder = saved(tmp_path / "bart", BartForConditionalGeneration(config))
    with pytest.raises(InputError, match="'bart' are not supported; those of type t5"):
        load_model(folder)
