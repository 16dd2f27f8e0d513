"""Distillation against its formula over whole logits, and the alignment of layers."""

import pytest
import torch
from tiny import (
    compute_activations_twice,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
    token_ids,
)
from torch import nn
from torch.nn import functional as F

from fastprune.errors import InputError
from fastprune.models import forward
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.conform import conform
from fastprune.models.families import geometries
from fastprune.models.forward import decoder_and_head
from fastprune.models.load import load_model
from fastprune.models.modeling import remove_sublayer
from fastprune.recover import distill
from fastprune.recover.align import align_layers
from fastprune.recover.distill import Distiller, load_teacher

CHUNKS = [2**24, 2 * 300 * 7, 1]
"""Logits at a time; distillation takes half as many: all, 7 tokens, one token."""


def batch(n=3, s=20):
    """A batch whose last window is padded and whose first begins with unscored tokens."""
    ids = token_ids(n, s)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :7] = -100
    labels[-1, -5:] = -100
    mask[-1, -5:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def student_loss(student, distiller, inputs, **options):
    decoder, head = decoder_and_head(student)
    output = decoder(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
    )
    states = output.hidden_states
    return distiller.loss(output.last_hidden_state, head, inputs, hidden_states=states, **options)


def expected_loss(student, teacher, inputs, weight, temperature):
    """The formula over whole logits, by the library."""
    masks = {"attention_mask": inputs["attention_mask"], "input_ids": inputs["input_ids"]}
    scored = inputs["labels"][:, 1:] != -100
    own = student(**masks).logits[:, :-1][scored]
    with torch.no_grad():
        other = teacher(**masks).logits[:, :-1][scored]
    labels = F.cross_entropy(own, inputs["labels"][:, 1:][scored])
    divergence = F.kl_div(
        F.log_softmax(own / temperature, -1),
        F.log_softmax(other / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * labels + weight * temperature**2 * divergence


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("weight", "temperature"), [(0.5, 1.0), (1.0, 2.0), (0.0, 1.0), (0.3, 0.5)]
)
def test_equals_its_formula(chunk, weight, temperature, monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk)
    student, teacher = tiny_model("llama").train(), tiny_model("qwen2", seed=5)
    inputs = batch()
    expected = expected_loss(student, teacher, inputs, weight, temperature)
    expected.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    distiller = Distiller(teacher, weight=weight, temperature=temperature, student=student)
    loss = student_loss(student, distiller, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # sums of fp32 logs of order 10
    for name, parameter in student.named_parameters():
        # the same fp32 terms in another order
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5 * scale, rtol=1e-3)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_parts_make_the_whole():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    distiller = Distiller(teacher, weight=0.25, hidden_weight=0.1, student=student)
    loss = student_loss(student, distiller, batch())
    parts = {name: value.item() for name, value in distiller.parts.items()}
    total = 0.75 * parts["labels"] + 0.25 * parts["divergence"] + 0.1 * parts["hidden"]
    assert loss.item() == pytest.approx(total, rel=1e-5)  # fp32 sums


def test_checkpointed_layers_give_the_same_gradients():
    """The hidden states' term reads the outputs of layers that are run again for the backward."""
    teacher, gradients = tiny_model("llama", seed=5), []
    for checkpointing in (False, True):
        student = tiny_model("llama").train()
        if checkpointing:
            compute_activations_twice(student)
        distiller = Distiller(teacher, hidden_weight=1.0, student=student)
        student_loss(student, distiller, batch()).backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teacher, student = tiny_model("llama"), tiny_model("llama").train()
    distiller = Distiller(teacher, weight=1.0, hidden_weight=1.0, student=student)
    loss = student_loss(student, distiller, batch())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    # fp32 rounding of softmax differences, against label gradients of order 0.1
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-5


def test_micro_batches_add_up():
    """Each with as many attended tokens, so that the hidden term's means add up as well."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    ids = token_ids(4, 20)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    distiller = Distiller(teacher, hidden_weight=0.1, student=student)
    whole = student_loss(student, distiller, inputs)
    halves = [
        student_loss(student, distiller, {k: v[rows] for k, v in inputs.items()}, items=4 * 19)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert sum(halves).item() == pytest.approx(whole.item(), rel=1e-5)


def test_logits_never_stand_whole(monkeypatch):
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 10 * 300)
    sizes = []
    own = F.kl_div

    def watched(student, *args, **kwargs):
        sizes.append(len(student))
        return own(student, *args, **kwargs)

    monkeypatch.setattr(distill.F, "kl_div", watched)
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    student_loss(student, Distiller(teacher), batch())
    assert max(sizes) == 5
    assert sum(sizes) == 3 * 19 - 6 - 5


def test_training_brings_the_student_towards_the_teacher():
    student, teacher = tiny_model("llama").train(), tiny_model("llama", seed=5)
    distiller = Distiller(teacher, weight=1.0, hidden_weight=0.1, student=student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    divergences = []
    for _ in range(20):
        optimizer.zero_grad()
        student_loss(student, distiller, batch()).backward()
        optimizer.step()
        divergences.append(distiller.parts["divergence"].item())
    assert divergences[-1] < divergences[0] / 2


@pytest.mark.parametrize("autocast", [False, True])
def test_a_teacher_in_half_precision(autocast):
    student, teacher = tiny_model("llama").train(), tiny_model("llama", seed=5)
    inputs = batch()
    exact = student_loss(student, Distiller(teacher), inputs)
    distiller = Distiller(teacher.to(torch.bfloat16), hidden_weight=1e-9, student=student)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = student_loss(student, distiller, inputs)
    loss.backward()
    # 8 bits in every product of four layers
    assert loss.item() == pytest.approx(exact.item(), rel=5e-2)
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_nothing_scored_is_zero():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    inputs = batch() | {"labels": torch.full((3, 20), -100)}
    loss = student_loss(student, Distiller(teacher), inputs)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in student.parameters())


# ---------------------------------------------------------------- layers


def without(model, attention=(), mlp=()):
    """`model` with sublayers removed, in the class that builds such layers."""
    for index in attention:
        remove_sublayer(model.model.layers[index], "attention", "llama")
    for index in mlp:
        remove_sublayer(model.model.layers[index], "mlp", "llama")
    conform(model, geometries(model))
    return model


def test_removed_sublayers_keep_the_layers_aligned():
    teacher = tiny_model("llama")
    student = without(tiny_model("llama"), attention=[0, 2], mlp=[1])
    distiller = Distiller(teacher, hidden_weight=1.0, student=student)
    assert distiller.layers == [0, 1, 2, 3]
    student_loss(student, distiller, batch()).backward()


@pytest.mark.parametrize("gone", [[0], [2], [5], [1, 2], [0, 3, 5]])
def test_lost_layers_are_found_by_what_is_left(tmp_path, gone):
    """Layers that lost everything are not written; the rest are trained a little."""
    teacher = tiny_model("llama", layers=6)
    student = without(tiny_model("llama", layers=6), attention=gone, mlp=gone)
    save_checkpoint(student, tiny_tokenizer(), tmp_path)
    student, _ = load_model(tmp_path)
    assert len(student.model.layers) == 6 - len(gone)
    for parameter in student.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    kept = [i for i in range(6) if i not in gone]
    assert align_layers(student.model, teacher.model) == kept
    distiller = Distiller(teacher, hidden_weight=1.0, student=student)
    student_loss(student, distiller, batch()).backward()


def test_a_student_that_only_lost_an_idle_layer_matches_its_teacher_everywhere(tmp_path):
    """What the next kept layer reads is what must be matched, not what the same layer wrote."""
    teacher = tiny_model("llama")
    nn.init.zeros_(teacher.model.layers[1].self_attn.o_proj.weight)
    nn.init.zeros_(teacher.model.layers[1].mlp.down_proj.weight)
    student = tiny_model("llama")
    save_checkpoint(without(student, attention=[1], mlp=[1]), tiny_tokenizer(), tmp_path)
    student, _ = load_model(tmp_path)
    distiller = Distiller(teacher, hidden_weight=1.0, student=student)
    student_loss(student, distiller, batch())
    assert distiller.parts["hidden"].item() < 1e-10  # squares of fp32 rounding


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"hidden_weight": -1.0}, "not be negative"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Distiller(tiny_model("llama"), **settings)


def test_another_vocabulary_is_refused():
    teacher = tiny_model("llama", vocab_size=301)
    with pytest.raises(InputError, match="301 tokens, the student's 300"):
        Distiller(teacher, student=tiny_model("llama"))
    with pytest.raises(InputError, match="301 tokens, the student's 300"):
        student_loss(tiny_model("llama"), Distiller(teacher), batch())


def test_another_hidden_size_is_refused_for_hidden_states_only():
    teacher, student = tiny_model("llama", hidden_size=32), tiny_model("llama")
    student_loss(student, Distiller(teacher, student=student), batch())
    with pytest.raises(InputError, match="64 and 32 numbers"):
        Distiller(teacher, hidden_weight=1.0, student=student)
    with pytest.raises(InputError, match="only 2"):
        Distiller(tiny_model("llama", layers=2), hidden_weight=1.0, student=student)


def test_a_teacher_is_loaded_frozen_and_must_read_the_same_tokens(tmp_path):
    source = tiny_checkpoint(tmp_path / "teacher")
    teacher = load_teacher(str(source), tiny_tokenizer(), dtype="bfloat16")
    assert teacher.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in teacher.parameters())

    class Other:
        def get_vocab(self):
            return {"a token of another tokenizer": 0}

    with pytest.raises(InputError, match="not the student's"):
        load_teacher(str(source), Other())
