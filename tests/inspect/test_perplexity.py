"""Perplexity against its definition, and the loss in chunks against the loss at once."""

import math

import pytest
import torch
from sentencepiece_words import sentencepiece_tokenizer
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer, token_ids
from torch.nn.functional import cross_entropy

from fastprune.errors import InputError
from fastprune.inspect.perplexity import (
    EvalConfig,
    Perplexity,
    evaluate,
    run_eval,
    with_bytes,
)
from fastprune.models import forward
from fastprune.models.forward import chunked_loss, loss_and_hidden_grad

CHUNKS = [2**24, 300 * 7, 1]
"""Logits at a time: all, 7 tokens (which divides no row), one token."""


def labels_with_gaps():
    labels = token_ids(3, 20)
    labels[0, :7] = -100
    labels[1, 5] = -100
    labels[2] = -100
    return labels


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_its_definition(family):
    model, ids = tiny_model(family), token_ids(5, 24)
    with torch.no_grad():
        logits = model(ids).logits.double()
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    result = evaluate(model, ids, batch_size=2)
    # the model computes in fp32: 1e-6 of a loss of about 7 is what its logits are good for
    assert math.log(result.perplexity) == pytest.approx(losses.item(), rel=1e-6)
    assert (result.tokens, result.seq_len, result.windows) == (5 * 23, 24, 5)
    assert result.peak_memory_bytes > 0


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_in_chunks_is_the_loss(chunk, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk)
    head = tiny_model("llama").lm_head
    hidden = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    labels = labels_with_gaps()
    expected = cross_entropy(
        head(hidden).double()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    with torch.no_grad():
        total, count = chunked_loss(hidden, head, labels)
    assert count == int((labels[:, 1:] != -100).sum())
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 logits
    (gradient,) = torch.autograd.grad(expected / count, hidden)
    mean, ours = loss_and_hidden_grad(hidden.detach(), head, labels)
    assert mean.item() == pytest.approx(expected.item() / count, rel=1e-6)
    # sums of 300 products in fp32 against fp64, of values up to 0.03
    torch.testing.assert_close(ours, gradient.float(), atol=1e-7, rtol=1e-5)


def test_loss_in_half_precision_is_close():
    model = tiny_model("llama").to(torch.bfloat16)
    hidden = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    labels = token_ids(2, 20)
    mean, gradient = loss_and_hidden_grad(hidden.bfloat16(), model.lm_head, labels)
    exact, reference = loss_and_hidden_grad(hidden, model.float().lm_head, labels)
    assert gradient.dtype == torch.bfloat16
    # bf16 keeps 8 bits: inputs and logits (up to 8) are off by 1/256 of their size
    assert mean.item() == pytest.approx(exact.item(), rel=2e-2)
    error = (gradient.float() - reference).norm() / reference.norm()
    assert error < 2e-2


def test_nothing_scored_is_zero_loss_and_zero_gradient():
    head = tiny_model("llama").lm_head
    mean, gradient = loss_and_hidden_grad(torch.randn(1, 5, 64), head, torch.full((1, 5), -100))
    assert mean == 0
    assert not gradient.any()


def test_broken_weights_give_nan_and_huge_losses_infinity():
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    assert math.isnan(evaluate(model, token_ids()).perplexity)
    torch.nn.init.constant_(model.model.norm.weight, 1e4)
    assert evaluate(model, token_ids()).perplexity == math.inf


def test_evaluation_leaves_the_mode_of_the_model():
    model = tiny_model("llama", attention_dropout=0.5).train()
    first, second = evaluate(model, token_ids()), evaluate(model, token_ids())
    assert model.training
    assert first.perplexity == second.perplexity


# peft 0.21 reads a property that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_evaluated_through():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    before = evaluate(model, token_ids()).perplexity
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert evaluate(adapted, token_ids()).perplexity == before
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert evaluate(adapted, token_ids()).perplexity != before


def test_run_eval_reports_every_key(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    result = run_eval(EvalConfig(model=str(model), text=str(text), seq_len=32, windows=4))
    assert list(result.to_dict()) == [
        "perplexity",
        "tokens",
        "seq_len",
        "windows",
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "text_bytes",
        "tasks",
        "model",
        "text",
        "params",
        "speed",
        "bits_per_byte",
    ]
    assert (result.windows, result.seq_len) == (4, 32)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece_tokenizer()])
def test_the_bytes_are_those_of_the_scored_text(tokenizer):
    encoded = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    count = len(encoded["input_ids"]) // 32 * 32
    windows = torch.tensor(encoded["input_ids"][:count]).view(-1, 32)
    spans = torch.tensor(encoded["offset_mapping"][:count]).view(-1, 32, 2)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    found = with_bytes(evaluate(model, windows), tokenizer, windows)
    assert found.text_bytes == int((spans[:, 1:, 1] - spans[:, 1:, 0]).sum())  # TEXT is ASCII
    nats = math.log(found.perplexity) * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.text_bytes)


def test_a_perplexity_per_token_of_another_model_has_the_same_bits_per_byte():
    sizes = {"seq_len": 11, "seconds": 1.0, "tokens_per_second": 1.0, "peak_memory_bytes": 0}
    long = Perplexity(perplexity=8.0, tokens=20, windows=2, text_bytes=60, **sizes)
    short = Perplexity(perplexity=5.0, tokens=30, windows=3, text_bytes=60, **sizes)
    assert long.bits_per_byte == pytest.approx(1.0)
    found = long.per_token_of(short)
    assert found.perplexity == pytest.approx(4.0)  # 2 bytes a token
    assert found.bits_per_byte == pytest.approx(1.0)
    assert (found.tokens, found.windows) == (30, 3)
    assert long.per_token_of(long).perplexity == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "at least 2"),
        ({"seq_len": 32, "windows": 0}, "at least 1"),
        ({"batch_size": 0}, "batch"),
        ({"seq_len": 4096}, "512 positions"),
        ({"seq_len": 500}, "fewer than one window"),
    ],
)
def test_run_eval_refuses_impossible_settings(tmp_path, settings, message):
    model = tiny_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(InputError, match=message):
        run_eval(EvalConfig(model=str(model), text=str(text), **settings))
