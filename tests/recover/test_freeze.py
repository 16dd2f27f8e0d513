"""What learns, how fast, and by which schedule."""

import pytest
import torch
from tiny import tiny_model

from fastprune.errors import InputError
from fastprune.kernels import AdamW
from fastprune.recover.freeze import (
    freeze,
    halve_rates,
    layer_of,
    make_schedule,
    parameter_groups,
    warmup_steps,
)
from fastprune.recover.recipes import Stage

LAYERS = 8


def learning(strategy):
    model = tiny_model("qwen2", layers=LAYERS, tied=False)
    count = freeze(model, strategy)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return names


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        ("most", {3, 4, 5, 6, 7}),
        ("half", {4, 5, 6, 7}),
        ("ends", {2, 3, 4, 5}),
        ("last:2", {6, 7}),
        ("last:8", set(range(8))),
    ],
)
def test_depth(strategy, layers):
    names = learning(strategy)
    assert {layer_of(n) for n in names} == {*layers, None}
    assert [n for n in names if layer_of(n) is None] == ["model.norm.weight"]


@pytest.mark.parametrize(("strategy", "kept"), [("attention", "mlp"), ("mlp", "self_attn")])
def test_kind(strategy, kept):
    names = learning(strategy)
    other = "self_attn" if kept == "mlp" else "mlp"
    assert not any(f".{other}." in n for n in names)
    assert sum(f".{kept}." in n for n in names) == LAYERS * (3 if kept == "mlp" else 7)
    assert not any("embed" in n or "head" in n for n in names)


def test_none_leaves_everything():
    model = tiny_model("qwen2", layers=LAYERS, tied=False)
    assert learning("none") == [name for name, _ in model.named_parameters()]


def test_nothing_left_is_an_error():
    model = tiny_model("llama")
    model.requires_grad_(False)
    with pytest.raises(InputError, match="nothing of this model"):
        freeze(model, "half")


@pytest.mark.parametrize("strategy", ["last", "last:0", "last:-1", "first:2", "last:2x"])
def test_a_strategy_that_is_none_is_refused(strategy):
    with pytest.raises(InputError, match="last:N"):
        Stage(freeze=strategy).check()


def test_more_layers_than_there_are():
    with pytest.raises(InputError, match="last:9: the model has only 8 layers"):
        learning("last:9")


def rates(stage, model=None):
    groups = parameter_groups(model or tiny_model("llama", layers=4, tied=False), stage)
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name, _ in g["params"]}


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay():
    model = tiny_model("qwen3", layers=4)
    found = rates(Stage(lr=1e-4, weight_decay=0.1), model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert found[name] == (1e-4, 0.1 if parameter.dim() > 1 else 0.0)


def test_decay_by_layer():
    found = {n: lr for n, (lr, _) in rates(Stage(lr=1.0, layer_lr_decay=0.5)).items()}
    down = [found[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(4)]
    assert down == [0.125, 0.25, 0.5, 1.0]
    assert found["model.embed_tokens.weight"] == 0.0625
    assert found["lm_head.weight"] == found["model.norm.weight"] == 1.0


def test_rates_by_parts_of_the_depth():
    found = {n: lr for n, (lr, _) in rates(Stage(layer_lrs=(5e-8, 1e-7))).items()}
    down = [found[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(4)]
    assert down == [5e-8, 5e-8, 1e-7, 1e-7]
    assert found["model.embed_tokens.weight"] == 5e-8
    assert found["lm_head.weight"] == 1e-7


def run(schedule, steps, halve_at=None, **settings):
    """The learning rate of each step."""
    optimizer = AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = make_schedule(Stage(schedule=schedule, lr=1.0, **settings), optimizer, steps)
    seen = []
    for step in range(steps):
        if step == halve_at:
            halve_rates(optimizer, schedule)
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one-cycle"])
def test_schedules(schedule):
    seen = run(schedule, 40, warmup_steps=10, div_factor=25.0)
    assert max(seen) == pytest.approx(1.0, rel=0.05)  # reached between two steps at worst
    assert seen[0] == pytest.approx(1 / 25 if schedule == "one-cycle" else 1 / 10)
    assert seen[:10] == sorted(seen[:10])
    assert seen[10:] == sorted(seen[10:], reverse=True)
    assert seen[-1] == 1.0 if schedule == "constant" else seen[-1] < 0.05


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one-cycle"])
def test_halved_rates_stay_halved(schedule):
    whole = run(schedule, 40, warmup_steps=4)
    halved = run(schedule, 40, warmup_steps=4, halve_at=20)
    assert halved[:20] == whole[:20]
    # one-cycle also halves the little it ends at; the formulas are those of the library in fp64
    assert halved[20:] == pytest.approx([rate / 2 for rate in whole[20:]], rel=1e-9)


def test_warm_up_by_share_and_by_steps():
    assert warmup_steps(Stage(warmup_ratio=0.12), 100) == 12
    assert warmup_steps(Stage(warmup_steps=5), 100) == 5
    assert warmup_steps(Stage(warmup_steps=500), 100) == 100


def test_one_cycle_needs_room():
    with pytest.raises(InputError, match="at least 4 steps"):
        run("one-cycle", 3)
