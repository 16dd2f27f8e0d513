"""Finetuning goes on with the moments of the optimizer that a training script saved."""

import pytest
import torch
from tiny import tiny_gpt2, tiny_model, tiny_tokenizer

from fastprune.kernels.optim import AdamW
from fastprune.models.load import load_model
from fastprune.models.script_optimizer import moments_for
from fastprune.recover.moments import left_moments, take_over

PROJECTIONS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SETTINGS = {"n_head": 4}


def linear(model):
    """The parameters as a script with linear layers has them, the tied head left out."""
    return {
        name: torch.nn.Parameter(p.detach().t().contiguous() if name.endswith(PROJECTIONS) else p)
        for name, p in model.named_parameters()
    }


def grouped(parameters, order):
    """Parameters in the groups of an optimizer."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    return {
        "all": [{"params": list(parameters.values())}],
        "decay first": [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        "named": [{"params": list(reversed(parameters.items()))}],
    }[order]


def stepped(parameters, order, optimizer=torch.optim.AdamW):
    made = optimizer(grouped(parameters, order), lr=1e-3)
    torch.manual_seed(1)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        made.step()
    return made


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("order", ["all", "decay first", "named"])
def test_every_moment_finds_its_parameter(folder, order, prefix):
    parameters = linear(tiny_gpt2())
    optimizer = stepped(parameters, order)
    state = {name: p.detach() for name, p in parameters.items()}
    state |= {"lm_head.weight": state["transformer.wte.weight"]}
    state = {prefix + name: value for name, value in state.items()}
    content = {"model": state, "optimizer": optimizer.state_dict(), "model_args": SETTINGS}
    torch.save(content, folder / "m.pt")
    model, _ = load_model(folder / "m.pt")
    found = moments_for(model, folder / "m.pt")
    ours = AdamW(model.named_parameters(), lr=1e-3)
    assert take_over(ours, found.moments) == len(parameters) == len(found.moments)
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            expected = optimizer.state[parameters[name]][key]
            expected = expected.t() if name.endswith(PROJECTIONS) else expected
            assert torch.equal(ours.state[parameter][key], expected), name
        assert int(ours.state[parameter]["step"]) == 3


def test_what_is_not_used_says_why(folder, caplog):
    parameters = linear(tiny_gpt2())
    state = {name: p.detach() for name, p in parameters.items()}
    momentum = stepped(parameters, "all", lambda groups, lr: torch.optim.SGD(groups, lr, 0.9))
    fewer = stepped(dict(list(parameters.items())[:4]), "all")
    other = stepped({name: torch.nn.Parameter(torch.ones(3)) for name in parameters}, "all")
    for optimizer, why in (
        (None, "it holds none"),
        ({"state": {}, "param_groups": []}, "has not stepped yet"),
        (momentum.state_dict(), "not an Adam"),
        (fewer.state_dict(), "its 4 parameters are not those of the weights"),
        (other.state_dict(), "parameters are not those of the weights"),
    ):
        torch.save(
            {"model": state, "model_args": SETTINGS, "optimizer": optimizer}, folder / "m.pt"
        )
        model, _ = load_model(folder / "m.pt")
        caplog.clear()
        assert left_moments(model, str(folder / "m.pt")) == {}
        assert why in caplog.text
    caplog.clear()
    assert left_moments(tiny_model("llama"), "somewhere") == {} and not caplog.text


def test_the_command_begins_with_them(folder, finetune):
    parameters = linear(tiny_gpt2())
    optimizer = stepped(parameters, "decay first")
    state = {name: p.detach() for name, p in parameters.items()}
    content = {"model": state, "model_args": SETTINGS, "optimizer": optimizer.state_dict()}
    torch.save(content, folder / "m.pt")
    flags = ["--max-steps", "1", "--samples", "4", "--precision", "fp32", "--keep-worse"]
    status, _, err = finetune(*flags, source=folder / "m.pt", out="with")
    assert status == 0, err
    assert f"moments of {len(parameters)} tensors, after 3 steps" in err
    torch.save(content | {"optimizer": None}, folder / "m.pt")
    status, _, err = finetune(*flags, source=folder / "m.pt", out="without")
    assert status == 0 and "no moments of an optimizer are used: it holds none" in err
    one, other = (load_model(folder / name)[0] for name in ("with", "without"))
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)
