"""Recipes: the numbers they stand for, what flags change, gates between their stages."""

import json

import pytest

from fastprune.errors import InputError
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.range_test import choose
from fastprune.recover.recipes import NAMES, load_recipe


def stages(name, **flags):
    return load_recipe(FinetuneConfig(recipe=str(name), **flags)).stages


def test_all_are_there():
    assert set(NAMES) == {
        "plain", "ultra-low", "staged", "frozen", "segmented", "layer-lr", "lora", "instruct",
        "sft-onecycle", "distill", "auto", "recover",
    }  # fmt: skip
    for name in NAMES:
        assert stages(name, teacher="dense")


def test_numbers_of_the_presets():
    (low,) = stages("ultra-low")
    assert (low.lr, low.max_grad_norm, low.seq_len, low.batch_size, low.grad_accum) == (
        1e-7, 0.1, 128, 1, 2,
    )  # fmt: skip
    assert (low.warmup_steps, low.samples) == (5, 200)
    assert [(s.lr, s.max_grad_norm, s.seq_len, s.epochs) for s in stages("staged")] == [
        (1e-7, 0.1, 128, 1), (5e-7, 0.3, 256, 1), (1e-6, 0.5, 512, 2),
    ]  # fmt: skip
    (lora,) = stages("lora")
    assert (lora.method, lora.lora_r, lora.lora_alpha, lora.lr) == ("lora", 8, 16, 5e-5)
    assert lora.batch_size * lora.grad_accum == 128
    assert [s.freeze for s in stages("segmented")] == ["mlp", "attention"]
    assert stages("layer-lr")[0].layer_lrs == (5e-8, 1e-7)
    (cycle,) = stages("sft-onecycle")
    assert (cycle.schedule, cycle.div_factor, cycle.stop_loss) == ("one-cycle", 25, 1.5)


def test_flags_apply_to_every_stage():
    changed = stages("staged", seq_len=64, lr=3e-6)
    assert [(s.seq_len, s.lr, s.max_grad_norm) for s in changed] == [
        (64, 3e-6, 0.1), (64, 3e-6, 0.3), (64, 3e-6, 0.5),
    ]  # fmt: skip
    assert stages("layer-lr", lr=1e-6)[0].layer_lrs == ()
    assert stages("auto", lr=1e-6)[0].find_lr is False
    (low,) = stages("ultra-low", warmup_ratio=0.2)
    assert (low.warmup_steps, low.warmup_ratio) == (None, 0.2)


def test_a_zero_is_a_choice():
    config = FinetuneConfig(recipe="instruct", lora_dropout=0.0, weight_decay=0.0, max_grad_norm=0)
    (stage,) = load_recipe(config).stages
    assert (stage.lora_dropout, stage.weight_decay, stage.max_grad_norm) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [", "not YAML"),
        ("about: x", "list of stages"),
        ("stages:\n  - lr: fast", "'fast' is not a number"),
        ("stages:\n  - learning: 1", "unknown option 'learning'"),
        ("stages:\n  - freeze: everything", "freeze"),
        ("stages:\n  - lr: 0", "--lr must be positive"),
        ("stage:\n  - lr: 1", "list of stages"),
        ("stages:\n  - lr: 1\ngates: 1", "unknown key 'gates'"),
    ],
)
def test_a_broken_recipe_says_where(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        stages(file)


RECIPE = """
about: a stage that learns, one that destroys, one that must not run
stages:
  - {{name: good, lr: 1e-3, max_steps: 6, gate: 1.0}}
  - {{name: destroys, lr: 1.0, max_steps: 4, max_grad_norm: 0, gate: 1.0, on_worse: {on_worse}}}
  - {{name: third, lr: 1e-3, max_steps: 2, gate: 10.0}}
"""


@pytest.fixture
def gated(finetune, tmp_path):
    """Run RECIPE; returns (status, stdout, stderr)."""

    def run(on_worse, *flags):
        (tmp_path / "mine.yaml").write_text(RECIPE.format(on_worse=on_worse))
        return finetune("--recipe", str(tmp_path / "mine.yaml"), *flags)

    return run


def test_a_stage_that_makes_it_worse_ends_the_run(gated, tmp_path):
    status, stdout, stderr = gated("stop")
    assert (status, stdout) == (3, "")
    assert "left out: third" in stderr
    message = stderr.splitlines()[-1]
    assert message.startswith("fastprune: error: destroys: perplexity went from ")
    assert "its gate is 1 times; nothing was written" in message
    assert f"good kept) are in {tmp_path / 'out/fastprune/state/start-1.safetensors'}" in message
    assert not (tmp_path / "out/config.json").exists()
    assert (tmp_path / "out/fastprune/state/start-1.safetensors").is_file()

    status, stdout, stderr = gated("stop", "--keep-worse")  # goes on from there
    assert status == 0, stderr
    assert "rolled back" in stdout
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    good, bad = metrics["stages"]
    assert (good["kept"], bad["kept"]) == (True, False)
    assert metrics["perplexity"][0]["after"] == good["perplexity"]["after"]


def test_a_stage_that_makes_it_worse_is_rolled_back(gated, tmp_path):
    status, stdout, stderr = gated("continue")
    assert status == 0, stderr
    assert "rolled back" in stdout
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    assert [stage["kept"] for stage in metrics["stages"]] == [True, False, True]
    good, bad, third = metrics["stages"]
    assert bad["perplexity"]["before"] == good["perplexity"]["after"]
    assert bad["perplexity"]["after"] > bad["perplexity"]["before"]
    # it begins where the good stage ended
    assert third["perplexity"]["before"] == good["perplexity"]["after"]


def test_the_rate_is_where_the_loss_falls_fastest():
    rates = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    chosen, reason = choose(4.0, rates, [4.0, 3.9, 3.5, 3.2, float("nan")])
    assert chosen == 1e-4
    assert "4.000 to 3.200" in reason
    assert choose(4.0, rates, [3.9, 3.7, 3.4, 3.0, 2.4])[0] == 1e-3  # it ended while falling
    # a single lucky stage among bad ones does not outweigh a steady fall
    wide = [1e-7, *rates, 1e-1]
    assert choose(4.0, wide, [4.05, 3.9, 3.95, 3.85, 3.73, 3.6, 3.7])[0] == 1e-3


def test_a_fall_at_the_first_rate_needs_nothing_before_it():
    assert choose(4.0, [1e-6, 1e-5], [3.0, float("inf")])[0] == 1e-6


def test_a_model_that_learns_nothing_gets_the_lowest_rate():
    chosen, reason = choose(4.0, [1e-6, 1e-5], [4.0, 4.5])
    assert chosen == 1e-6
    assert "nothing" in reason


def test_auto_finds_a_rate_and_leaves_the_weights(finetune, tmp_path):
    status, _, stderr = finetune("--recipe", "auto", "--max-steps", "6")
    assert status == 0, stderr
    assert "learning rate" in stderr and "is used" in stderr
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    stage = metrics["stages"][0]
    assert stage["lr"] == stage["range_test"]["chosen"]
    assert 1e-6 < stage["lr"] < 1e-2
    first = json.loads((tmp_path / "out/fastprune/train_log.jsonl").read_text().splitlines()[0])
    # the test's steps are undone: training begins at the loss the test began at, another batch's
    assert first["loss"] == pytest.approx(stage["range_test"]["before"], rel=0.2)


def test_the_cautious_ones_are_the_scripts_own():
    (frozen,) = stages("frozen")
    assert (frozen.lr, frozen.max_grad_norm, frozen.epochs) == (1e-7, 0.1, 2)
    (cycle,) = stages("sft-onecycle")
    assert cycle.seq_len == 256
