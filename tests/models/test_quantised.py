"""Models whose projections are held in 8 bits, and why they cannot be."""

import importlib.util
import json

import pytest
import torch
from tiny import TEXT, saved, tiny_checkpoint, tiny_gpt2, tiny_model, token_ids

from fastprune import cli
from fastprune.errors import InputError
from fastprune.models import quantised
from fastprune.models.quantised import quantise

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@needs_torchao
def test_eight_bits_hold_almost_the_same():
    model = tiny_model("llama", layers=2)
    ids = token_ids()
    with torch.no_grad():
        before = model(ids).logits
        head = model.lm_head.weight.clone()
        quantise(model, 8)
        after = model(ids).logits
    difference = (after - before).norm() / before.norm()
    assert 0 < difference < 0.05
    assert torch.equal(model.lm_head.weight, head)
    assert type(model.model.layers[0].mlp.down_proj.weight) is not torch.nn.Parameter


@needs_torchao
def test_the_commands_take_it(tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    (tmp_path / "t.txt").write_text(TEXT * 4)
    call = ["eval", str(model), "--text", str(tmp_path / "t.txt"), "--seq-len", "32"]
    call += ["--windows", "2", "--json", str(tmp_path / "e.json")]
    found = []
    for flags in ([], ["--quantize", "8"]):
        assert cli.main([*call, *flags]) == 0
        found.append(json.loads((tmp_path / "e.json").read_text())["perplexity"])
    assert found[0] != found[1] == pytest.approx(found[0], rel=0.02)
    prompt = ["--prompt", "The river", "--max-new-tokens", "4", "--quantize", "8"]
    assert cli.main(["generate", str(model), *prompt]) == 0
    assert cli.main([*call, "--quantize", "3"]) == 2
    assert "--quantize" in capsys.readouterr().err


@needs_torchao
def test_what_does_not_run_here_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(InputError, match="no linear layers"):
        quantise(tiny_gpt2(), 8)
    monkeypatch.setattr(
        "torchao.quantization.Int4WeightOnlyConfig", lambda: refuse("needs a kernel")
    )
    with pytest.raises(InputError, match=r"does not run on this device \(needs a kernel\); use"):
        quantise(tiny_model("llama", layers=2), 4)


def refuse(why):
    raise ImportError(why)


def test_what_must_be_installed_is_said(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        quantised.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torchao" else found(name, *rest),
    )
    model = saved(tmp_path / "model", tiny_model("llama", layers=2))
    call = ["generate", str(model), "--prompt", "a", "--quantize", "8"]
    assert cli.main(call) == 2
    assert "pip install 'fastprune[quantize]'" in capsys.readouterr().err
