"""Speeds: what is measured, in which turns, and that a step of either cache decodes the same."""

import json

import pytest
import torch
from counting import keeping
from tiny import FAMILIES, tiny_checkpoint, tiny_model

from fastprune import cli
from fastprune.errors import InputError
from fastprune.inspect import speed
from fastprune.inspect.memory import Extra
from fastprune.inspect.speed import FULL, Decoding, Reading, Selection, measure_speeds
from fastprune.models.families import geometries
from fastprune.pruning.plan import Plan
from fastprune.pruning.surgery import apply_plan

BRIEF = Selection(prompts=(16, 2048), batches=(1, 3), turns=3)


def pruned(family: str) -> torch.nn.Module:
    """Layers of four sizes, one without attention, one without MLP."""
    model = tiny_model(family)
    kept = [keeping(i, (0, 2) if i else (), tuple(range(40 + i))) for i in range(3)]
    apply_plan(model, Plan(tuple(geometries(model)), (*kept, keeping(3, (1,), ()))))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [tiny_model, pruned])
def test_a_cache_of_fixed_size_decodes_the_same(family, make):
    model = make(family)
    growing, fixed = (Decoding(model, 20, batch=3, steps=4, static=s) for s in (False, True))
    for _ in range(4):
        growing.step(), fixed.step()
    # sums over the empty places of the cache are added in another order
    torch.testing.assert_close(growing.output, fixed.output, atol=2e-5, rtol=1e-5)
    assert growing.output.shape == (3, 1, 300)


def test_a_step_over_a_cache_of_fixed_size_asks_the_device_nothing():
    """Else it could not be a CUDA graph: the tracer refuses what depends on a tensor's values."""
    decoding = Decoding(pruned("llama"), 8, static=True)
    traced = torch.compile(decoding.module, backend="eager", fullgraph=True)
    with torch.no_grad():
        output = traced(decoding._token, use_cache=True, **{decoding.keyword: decoding.cache})
    assert output[0].shape == (1, 1, 300)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", [tiny_model, pruned])
def test_a_cuda_graph_decodes_the_same(make):
    model = make("llama").to("cuda")
    graph, plain = Decoding(model, 20, batch=3), Decoding(model, 20, batch=3, static=False)
    assert graph.graph is not None and plain.graph is None
    for _ in range(4):
        graph.step(), plain.step()
    torch.testing.assert_close(graph.output, plain.output, atol=1e-3, rtol=1e-3)
    assert measure_speeds({"model": model}, BRIEF)["model"].decoded_by == "CUDA graph"


def test_every_workload_has_a_rate_and_its_spread():
    models = {"dense": tiny_model("llama"), "model": pruned("llama")}
    found = measure_speeds(models, BRIEF)
    assert list(found) == ["dense", "model"]
    for measured in found.values():
        assert [(m.tokens, m.batch) for m in measured.prompt] == [(16, 1), (512, 1)]
        assert [(m.tokens, m.batch) for m in measured.decoding] == [(128, 1), (128, 3)]
        for rate in (m.tokens_per_second for m in (*measured.prompt, *measured.decoding)):
            assert 0 < rate.low <= rate.median <= rate.high < float("inf")
    weights = sum(p.nbytes for p in models["dense"].parameters())
    assert found["dense"].peak_memory_bytes >= weights
    assert json.loads(json.dumps(found["dense"].to_dict())) == found["dense"].to_dict()


def test_models_take_turns(monkeypatch):
    order = []
    real = Reading.turn
    monkeypatch.setattr(Reading, "turn", lambda self: order.append(self.model) or real(self))
    one, other = tiny_model("llama", layers=1), tiny_model("llama", layers=2)
    measure_speeds({"one": one, "other": other}, Selection((8,), (), 3))
    assert order[4:] == [one, other] * 3  # each has read twice before: to load, and to warm up


def test_prompts_fit_the_model(monkeypatch):
    monkeypatch.setattr(speed, "STEPS", 2)
    small = tiny_model("llama", max_position_embeddings=100)
    found = measure_speeds({"small": small, "large": tiny_model("llama")}, FULL)
    for measured in found.values():
        assert [m.tokens for m in measured.prompt] == [100]
        context = 100 - speed.WARM_UP - FULL.turns * speed.STEPS
        assert {m.tokens for m in measured.decoding} == {context}
        assert [m.batch for m in measured.decoding] == [1, 8, 32]


def test_an_encoder_decoder_model_is_refused(monkeypatch):
    monkeypatch.setattr(speed, "is_seq2seq", lambda model: True)
    with pytest.raises(InputError, match="decoder-only"):
        measure_speeds({"t5": tiny_model("llama")}, BRIEF)


def test_memory_that_work_takes_is_counted_even_when_it_is_freed():
    extra = Extra(torch.device("cpu"))
    torch.ones(64 * 2**20, dtype=torch.uint8)
    after = extra.bytes()
    if not after:
        pytest.skip("the system does not tell")
    assert 60 * 2**20 < after < 96 * 2**20


def test_eval_measures_both_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastprune.inspect.perplexity.FULL", BRIEF)
    monkeypatch.setenv("COLUMNS", "120")
    dense = tiny_checkpoint(tmp_path / "dense")
    small = tiny_checkpoint(tmp_path / "small", layers=2)
    file = tmp_path / "result.json"
    flags = ["--windows", "2", "--seq-len", "32", "--speed", "--dense", str(dense)]
    assert cli.main(["eval", str(small), *flags, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["speed"]
    assert list(found) == ["dense", "model"]
    assert [m["batch"] for m in found["model"]["decoding"]] == [1, 3]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "speed dense model" in lines
    (row,) = [line for line in lines if line.startswith("decoding, batch 3, tokens/s")]
    rates = [found[name]["decoding"][1]["tokens_per_second"]["median"] for name in found]
    assert f"×{rates[1] / rates[0]:.3g}" in row


def test_a_dense_model_without_speed_is_refused(tmp_path, capsys):
    assert cli.main(["eval", str(tiny_checkpoint(tmp_path / "m")), "--dense", "x"]) == 2
    assert "--dense is the model that --speed compares with: give both" in capsys.readouterr().err
