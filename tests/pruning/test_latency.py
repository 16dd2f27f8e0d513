"""The cost table: made of runs of real layers. What a run takes is the machine's affair."""

from __future__ import annotations

import itertools

import pytest
import torch
from counting import keeping
from tiny import FAMILIES, tiny_model, tiny_tokenizer

from fastprune.inspect.speed import Decoding
from fastprune.models.families import Geometry, geometries
from fastprune.pruning import latency
from fastprune.pruning.latency import decoder_stack, measure, measure_again
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.surgery import apply_plan


def clock_by_weights(monkeypatch) -> None:
    """Let a step take as many milliseconds as its module has parameters in layers: no clock."""

    def step(self: Decoding) -> float:
        self._forward(self._token)
        decoder = getattr(self.module, "model", self.module)
        return float(sum(p.numel() for p in decoder.layers.parameters()))

    monkeypatch.setattr(Decoding, "step", step)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_known_times(family: str, monkeypatch) -> None:
    """Where time is proportional to parameters the table must say so, and predict exactly."""
    clock_by_weights(monkeypatch)
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    table = measure(model, 16)
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert table.context == 16
    assert [n for n, _ in table.widths["attention"]] == [0, 1, 2, 3, 4]
    assert len(table.widths["mlp"]) == 10 and table.widths["mlp"][-1][0] == 96
    for points in (table.widths["attention"], table.widths["mlp"]):
        assert points[0] == (0, 0.0)
        assert all(a[1] < b[1] for a, b in itertools.pairwise(points))

    sizes = tuple(geometries(model))
    whole = keep_all(sizes).layers
    plan = Plan(
        sizes,
        (keeping(0, (), whole[0].kept["mlp"]), keeping(1, (1,), tuple(range(43))), *whole[2:]),
    )
    predicted = table.predicted(plan.result())
    apply_plan(model, plan)
    after = measure_again(model, table)
    # 43 channels lie between two measured widths; ratios are divided and multiplied in fp64
    assert after == pytest.approx(predicted, rel=1e-9)


def test_a_pruned_model_is_measured_up_to_its_largest_layer(monkeypatch) -> None:
    clock_by_weights(monkeypatch)
    model = tiny_model("llama")
    sizes = tuple(geometries(model))
    kept = [keeping(i, (0, 2) if i else (), tuple(range(40 + i))) for i in range(4)]
    apply_plan(model, Plan(sizes, tuple(kept)))
    table = measure(model, 16)
    assert table.widths["attention"][-1][0] == 2 and table.widths["mlp"][-1][0] == 43
    assert table.predicted(geometries(model)) == table.dense


def test_real_steps_are_positive() -> None:
    """One run by the real clock: everything is finite, and times rise with the width."""
    table = measure(tiny_model("qwen3"), 8)
    assert table.dense > 0 and table.stack[2] > 0
    for points in (table.widths["attention"], table.widths["mlp"]):
        values = [value for _, value in points]
        assert values == sorted(values) and all(0 <= v < float("inf") for v in values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_decodes_like_a_model(family: str) -> None:
    """Layers of the wanted size, in a cache that grows by one token a step."""
    model = tiny_model(family)
    stack = decoder_stack(model, Geometry(6, 3, 50, 16), 2)
    assert len(stack.layers) == 2
    assert stack.layers[0].self_attn.q_proj.out_features == 6 * 16
    assert stack.layers[1].mlp.down_proj.in_features == 50
    decoding = Decoding(stack, 8)
    length = decoding.cache.get_seq_length()
    decoding.step()
    assert (length, decoding.cache.get_seq_length()) == (8 + latency.WARM_UP, 9 + latency.WARM_UP)
    with torch.no_grad():
        hidden = stack(input_ids=torch.zeros(1, 5, dtype=torch.int64)).last_hidden_state
    assert hidden.isfinite().all()


def test_context_fits_the_positions(monkeypatch) -> None:
    clock_by_weights(monkeypatch)
    assert measure(tiny_model("llama", max_position_embeddings=32), 128).context == 32 - 17


def test_the_command_reports_what_it_reached(tmp_path, monkeypatch, caplog) -> None:
    from tiny import TEXT

    from fastprune.pruning.config import PruneConfig
    from fastprune.pruning.pipeline import prune

    clock_by_weights(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    model = tiny_model("llama")
    dense = measure(model, 16).dense
    config = PruneConfig(
        target_latency=0.8 * dense,
        latency_context=16,
        importance="magnitude-l2",
        calib=str(text),
        calib_samples=2,
        calib_seq_len=16,
        eval=str(text),
        eval_seq_len=32,
        eval_windows=1,
    )
    metrics = prune(model, tiny_tokenizer(), config).metrics
    found = metrics["latency"]
    assert found["before"] == pytest.approx(dense)
    assert found["after"] == metrics["budget"]["achieved"]
    assert "above the" not in caplog.text
    assert metrics["ratio"]["requested"] is None
    # time is parameters here: the budget is met to a channel (192 of 172,672) from below
    assert found["after"] == pytest.approx(found["predicted"], rel=1e-9)
    assert 0.8 - 0.0012 <= found["after"] / dense <= 0.8 + 1e-9

    monkeypatch.setattr(latency, "measure_again", lambda *_: 0.9 * dense)
    prune(tiny_model("llama"), tiny_tokenizer(), config)
    assert "above the" in caplog.text


def test_the_time_before_is_that_of_the_whole_vocabulary(tmp_path, monkeypatch) -> None:
    from tiny import TEXT

    from fastprune.models.vocabulary import embedding_rows
    from fastprune.pruning.config import PruneConfig
    from fastprune.pruning.pipeline import prune

    clock_by_weights(monkeypatch)
    monkeypatch.setattr(latency, "measure_again", lambda model, _: float(embedding_rows(model)))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    model = tiny_model("llama", layers=2)
    config = PruneConfig(
        target_latency=0.8 * measure(model, 16).dense,
        latency_context=16,
        vocab="280",
        importance="magnitude-l2",
        compensate="none",
        calib=str(text),
        calib_samples=2,
        calib_seq_len=16,
        eval=str(text),
        eval_seq_len=32,
        eval_windows=1,
    )
    found = prune(model, tiny_tokenizer(), config).metrics["latency"]
    assert (found["before"], found["after"]) == (300.0, 280.0)
