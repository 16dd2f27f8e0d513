"""The head in chunks against the model's own logits and loss, where these are scaled or capped."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, token_ids
from torch.nn import functional as F

from fastprune.errors import InputError
from fastprune.inspect.against import compare
from fastprune.inspect.perplexity import evaluate
from fastprune.models import forward
from fastprune.models.forward import (
    Head,
    chunked_loss,
    decoder_and_head,
    loss_and_hidden_grad,
)
from fastprune.models.layers import resident
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.divergence import EVERY, Yardstick
from fastprune.recover.distill import Distiller
from fastprune.recover.loss import next_token_loss

SCALED = ("cohere", "cohere2", "granite")
CAPPED = {
    "gemma2": {},
    "gemma3_text": {"final_logit_softcapping": 5.0},
}
IDS = token_ids(3, 20)
CHUNKS = [2**24, 300 * 7]
"""Logits at a time: all, and 7 tokens, which divides no row."""


def changing(family: str, **config) -> torch.nn.Module:
    """A model of a family that changes its head's output."""
    return tiny_model(family, **(CAPPED.get(family, {}) | config))


def labels() -> torch.Tensor:
    found = IDS.clone()
    found[0, :7] = -100
    return found


def own_loss(model, targets) -> torch.Tensor:
    logits = model(input_ids=IDS).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())


@pytest.mark.parametrize("family", [*SCALED, *CAPPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gives_the_logits_of_the_model(family, dtype):
    model = changing(family).to(dtype)
    decoder, head = decoder_and_head(model)
    assert head.cap is not None if family in CAPPED else head.scale != 1
    with torch.no_grad():
        logits = head(decoder(input_ids=IDS).last_hidden_state)
        expected = model(input_ids=IDS).logits
        plain = model.lm_head(decoder(input_ids=IDS).last_hidden_state)
    # the same operations in the same dtype; Granite divides where a product rounds once more
    torch.testing.assert_close(logits, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (plain - expected).abs().max() > 1


@pytest.mark.parametrize("family", [*SCALED, *CAPPED])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_gradient_is_that_of_the_model_s_own_loss(family, chunk, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk)
    model = changing(family)
    expected = own_loss(model, labels())
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    decoder, head = decoder_and_head(model)
    loss = next_token_loss(decoder(input_ids=IDS).last_hidden_state, head, labels())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        # the same fp32 sums in another order
        size = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("family", [*SCALED, *CAPPED])
def test_the_gradient_of_hidden_states(family):
    model = changing(family)
    decoder, head = decoder_and_head(model)
    hidden = decoder(input_ids=IDS).last_hidden_state.detach().requires_grad_()
    output = F.linear(hidden, model.lm_head.weight)
    logits = output * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels()[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss, ours = loss_and_hidden_grad(hidden.detach(), head, labels())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours, gradient, atol=1e-6 * gradient.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("family", ["cohere2", "gemma2"])
def test_measurements_are_of_the_model_s_own_distribution(family):
    """Perplexity, and both divergences, against those of whole logits."""
    dense, other = changing(family), changing(family, seed=1)
    with torch.no_grad():
        loss = own_loss(other, IDS)
        true, guess = (m(input_ids=IDS).logits.log_softmax(-1) for m in (dense, other))
    kl = (true.exp() * (true - guess)).sum(-1).mean().item()
    assert evaluate(other, IDS).perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    compared = compare(other, dense, IDS, name="", perplexities=(1.0, 1.0))
    assert compared.kl == pytest.approx(kl, rel=1e-4)
    yardstick = Yardstick(Calibration(resident(dense), IDS))
    bound = yardstick.divergence(resident(other))
    some = slice((IDS.shape[1] - 1) % EVERY, None, EVERY)  # the last token is one of them
    true, guess = true[:, some], guess[:, some]
    kl = (true.exp() * (true - guess)).sum(-1).mean().item()
    true, guess = (_merged(logs, true) for logs in (true, guess))
    merged = (true.exp() * (true - guess)).sum(-1).mean().item()
    assert bound == pytest.approx(merged, rel=1e-4) and bound <= kl


def _merged(logs: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the 64 likeliest words by the logarithms `by`, and of all others."""
    top = logs.gather(-1, by.topk(64).indices)
    return torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], -1)


@pytest.mark.parametrize("family", ["cohere2", "gemma2"])
def test_the_teacher_is_the_model_too(family):
    teacher, student = changing(family), changing(family, seed=1)
    distiller = Distiller(teacher, weight=1.0, temperature=2.0, student=student)
    decoder, head = decoder_and_head(student)
    hidden = decoder(input_ids=IDS).last_hidden_state
    loss = distiller.loss(hidden, head, {"input_ids": IDS, "labels": IDS})
    ours = torch.autograd.grad(loss, list(student.parameters()))
    with torch.no_grad():
        true = (teacher(input_ids=IDS).logits[:, :-1] / 2).log_softmax(-1)
    guess = (student(input_ids=IDS).logits[:, :-1] / 2).log_softmax(-1)
    expected = 4 * (true.exp() * (true - guess)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for own, exact in zip(ours, torch.autograd.grad(expected, list(student.parameters()))):
        torch.testing.assert_close(own, exact, atol=1e-5 * exact.abs().max().item(), rtol=1e-3)


def test_a_plain_head_changes_nothing():
    model = tiny_model("llama")
    hidden = torch.randn(2, 9, 64)
    head = Head.of(model.lm_head)
    assert torch.equal(head(hidden), model.lm_head(hidden)) and head.slope(head(hidden)) is None
    whole, bare = (chunked_loss(hidden, h, IDS[:2, :9]) for h in (head, model.lm_head))
    assert whole == bare


def test_what_is_not_known_to_be_done_to_logits_is_refused():
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match=r"'llama' change their logits \(final_logit_softcapping"):
        decoder_and_head(model)
    model.config.final_logit_softcapping = None
    model.config.model_type, model.config.logits_scaling = "hyperclovax", 2.0
    with pytest.raises(InputError, match="logits_scaling"):
        decoder_and_head(model)
