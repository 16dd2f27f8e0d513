"""The chunked training loss against F.cross_entropy over whole logits, in value and gradient."""

import pytest
import torch
from tiny import compute_activations_twice, tiny_model, token_ids
from torch import nn
from torch.nn import functional as F

from fastprune.errors import InputError
from fastprune.models import forward
from fastprune.models.forward import decoder_and_head
from fastprune.recover import loss as module
from fastprune.recover.loss import next_token_loss

CHUNKS = [2**24, 300 * 7, 1]
"""Logits at a time: all, 7 tokens (which divides no row), one token."""


def labels_with_gaps():
    labels = token_ids(3, 20)
    labels[0, :7] = -100
    labels[1, 5] = -100
    labels[2] = -100
    return labels


def inputs(*, bias=False, dtype=torch.float32):
    """Hidden states (3, 20, 32) and an output layer of 300 words, both to be differentiated."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 20, 32, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(32, 300, bias=bias)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return hidden, head.to(dtype)


def whole(hidden, head, labels, items=None):
    """The same loss by F.cross_entropy in fp64, and its gradients."""
    tensors = [t.detach().double().requires_grad_() for t in (hidden, *head.parameters())]
    logits = F.linear(*tensors)[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    loss = total / (items or int((labels[:, 1:] != -100).sum()))
    return loss, torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("items", [None, 50])
def test_equals_cross_entropy_of_whole_logits(chunk, bias, items, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk)
    hidden, head = inputs(bias=bias)
    labels = labels_with_gaps()
    loss = next_token_loss(hidden, head, labels, items)
    expected, gradients = whole(hidden, head, labels, items)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 logits of up to 10
    ours = torch.autograd.grad(loss, [hidden, *head.parameters()])
    for ours_of, exact in zip(ours, gradients, strict=True):
        # sums of up to 300 fp32 products of at most 0.1
        torch.testing.assert_close(ours_of, exact.float(), atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("elements", [32 * 300, 32 * 7, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_blocks_of_rows(elements, dtype, monkeypatch):
    """All rows of the weight's gradient at once, 7 (which divides no 300), and one at a time."""
    monkeypatch.setattr(module, "PRODUCT_ELEMENTS", elements)
    hidden, head = inputs(dtype=dtype)
    loss = next_token_loss(hidden, head, labels_with_gaps())
    _, (_, exact) = whole(hidden, head, labels_with_gaps())
    (ours,) = torch.autograd.grad(loss, [head.weight])
    assert ours.dtype == dtype
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps  # logits, products and their sum are each rounded


def test_matches_a_numerical_derivative():
    """A step of the hidden states changes the loss as the gradient says."""
    hidden, head = inputs()
    labels = labels_with_gaps()
    (gradient,) = torch.autograd.grad(next_token_loss(hidden, head, labels), hidden)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).double()
    step = 1e-5
    up, down = (whole(hidden.double() + s * direction, head, labels)[0] for s in (step, -step))
    slope = (up - down).item() / (2 * step)
    # the central difference is off by step² times a third derivative of order 1; fp32 by 1e-6
    assert (gradient.double() * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_of_a_model(tied, checkpointing):
    """Tied embeddings collect both gradients; checkpointed layers run again for the backward."""
    model, ids = tiny_model("llama", tied=tied).train(), token_ids(2, 24)
    labels = ids.clone()
    labels[0, :9] = -100
    logits = model(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        compute_activations_twice(model)
    decoder, head = decoder_and_head(model)
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    next_token_loss(hidden, head, labels).backward()
    for name, parameter in model.named_parameters():
        # the same fp32 sums in another order
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5 * scale, rtol=1e-4)


def test_micro_batches_add_up():
    hidden, head = inputs()
    labels = labels_with_gaps()
    items = int((labels[:, 1:] != -100).sum())
    at_once = torch.autograd.grad(next_token_loss(hidden, head, labels), head.weight)[0]
    for i in range(3):
        next_token_loss(hidden[i : i + 1], head, labels[i : i + 1], torch.tensor(items)).backward()
    torch.testing.assert_close(head.weight.grad, at_once, atol=1e-7, rtol=1e-5)  # order of sums


def test_nothing_scored_is_zero_with_zero_gradient():
    hidden, head = inputs()
    loss = next_token_loss(hidden, head, torch.full((3, 20), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, head = inputs()
    head.requires_grad_(False)
    next_token_loss(hidden, head, token_ids(3, 20)).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    head.requires_grad_(True)
    next_token_loss(hidden.detach(), head, token_ids(3, 20)).backward()
    assert head.weight.grad.any()


def test_evaluation_computes_no_gradient(monkeypatch):
    scales = []
    kernel = module.cross_entropy

    def watched(logits, targets, *, scale):
        scales.append(scale)
        return kernel(logits, targets, scale=scale)

    monkeypatch.setattr(module, "cross_entropy", watched)
    hidden, head = inputs()
    with torch.no_grad():
        without = next_token_loss(hidden, head, token_ids(3, 20))
    assert not without.requires_grad
    assert scales == [None]
    assert torch.equal(without, next_token_loss(hidden, head, token_ids(3, 20)).detach())


def test_logits_never_stand_whole(monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 5 * 300)
    rows = []
    kernel = module.cross_entropy

    def watched(logits, targets, *, scale):
        rows.append(len(logits))
        return kernel(logits, targets, scale=scale)

    monkeypatch.setattr(module, "cross_entropy", watched)
    hidden, head = inputs()
    next_token_loss(hidden, head, token_ids(3, 20)).backward()
    assert sum(rows) == 3 * 19
    assert max(rows) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 7 * 300)
    labels = labels_with_gaps()
    hidden, head = inputs(bias=True)
    expected, gradients = whole(hidden, head, labels)
    if not autocast:
        hidden, head = hidden.detach().to(dtype).requires_grad_(), head.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = next_token_loss(hidden, head, labels)
    ours = torch.autograd.grad(loss, [hidden, *head.parameters()])
    # inputs, logits and their gradient are each rounded to 8 (bf16) or 11 (fp16) bits
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for own, exact, source in zip(ours, gradients, [hidden, *head.parameters()], strict=True):
        assert own.dtype == source.dtype
        assert (own.double() - exact).norm() < tolerance * exact.norm()


def test_fp16_neither_overflows_nor_vanishes():
    """Thousands of tokens predict one word from large states; the loss is then scaled up."""
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(1, 4096, 32, generator=generator) + 40).half().requires_grad_()
    head = nn.Linear(32, 300, bias=False).half()
    labels = torch.full((1, 4096), 5)
    (next_token_loss(hidden, head, labels) * 2.0**10).backward()
    for tensor in (hidden, head.weight):
        assert tensor.grad.isfinite().all()
    # unscaled, a gradient of 1/4095 of a softmax over 300 words is below fp16's smallest number
    assert (hidden.grad != 0).float().mean() > 0.9


def test_can_be_differentiated_once():
    hidden, head = inputs()
    loss = next_token_loss(hidden, head, token_ids(3, 20))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_output_layers_that_are_more_than_linear_are_refused():
    hidden, head = inputs()
    with pytest.raises(InputError, match="Sequential"):
        next_token_loss(hidden, nn.Sequential(head), token_ids(3, 20))
