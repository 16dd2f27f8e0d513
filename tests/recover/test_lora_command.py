"""LoRA from `finetune` on: the adapter is evaluated, merged, or gone into the weights."""

import json

import pytest

from fastprune.inspect.perplexity import EvalConfig, run_eval
from fastprune.recover.merge import MergeConfig, run_merge

TWO_STAGES = """about: two stages of LoRA
stages:
  - {name: first, method: lora, lora_r: 2, lr: 1e-2, max_steps: 2}
  - {name: second, method: lora, lora_r: 2, lr: 1e-2, max_steps: 2, gate: 1.0}
"""


def perplexity(model, text, **options):
    config = EvalConfig(model=str(model), text=str(text), seq_len=32, windows=2, **options)
    return run_eval(config).perplexity


def reported(out):
    metrics = json.loads((out / "fastprune/metrics.json").read_text())
    return metrics["perplexity"][0]["after"]


def test_a_trained_adapter_does_what_the_run_reported(finetune, model, held_out, tmp_path):
    flags = ["--max-steps", "4", "--method", "lora", "--teacher", str(model), "--lr", "1e-2"]
    status, _, stderr = finetune(*flags)
    assert status == 0, stderr
    adapter = tmp_path / "out"
    # fp32 sums in another order
    assert perplexity(model, held_out, adapter=adapter) == pytest.approx(
        reported(adapter), rel=1e-5
    )
    run_merge(MergeConfig(model=str(model), adapter=adapter, out=tmp_path / "merged"))
    assert perplexity(tmp_path / "merged", held_out) == pytest.approx(reported(adapter), rel=1e-4)


def test_adapters_of_several_stages_go_into_the_weights(finetune, model, held_out, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TWO_STAGES)
    status, _, stderr = finetune("--recipe", str(recipe))
    assert status == 0, stderr
    out = tmp_path / "out"
    assert not (out / "adapter_config.json").exists()
    assert perplexity(out, held_out) == pytest.approx(reported(out), rel=1e-4)
    assert perplexity(out, held_out) < perplexity(model, held_out)
