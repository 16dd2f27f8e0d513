"""What `finetune` says of its result: worse, recovered, out of proportion; and on the way there."""

import json
import re

import pytest
import torch
from tiny import TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer

from fastprune import cli
from fastprune.inspect.conclude import EXPLODED, Trained
from fastprune.inspect.record import Figures, Origin
from fastprune.recover.recipes import Stage
from fastprune.recover.stage import gate_passed
from fastprune.recover.steps import StepCounts

WORSE = ("--max-steps", "4", "--lr", "0.3", "--max-grad-norm", "0")


def metrics_of(out):
    return json.loads((out / "fastprune" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A tiny model that has learnt the text: it can be made worse."""
    model = tiny_model("llama", layers=2).train()
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][:128]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("learnt")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_what_got_worse_is_not_written_unless_it_is_wanted(finetune, learnt, tmp_path):
    status, stdout, stderr = finetune(*WORSE, source=learnt)
    assert (status, stdout) == (3, "")
    assert "the training made the model worse" in stderr.splitlines()[-1]
    assert not (tmp_path / "out/config.json").exists()

    status, stdout, stderr = finetune(*WORSE, "--keep-worse", source=learnt)
    assert status == 0, stderr
    assert "worse than before the training: perplexity" in stdout
    assert "\033" not in stdout  # no colours where there is no terminal
    verdict = metrics_of(tmp_path / "out")["verdict"]
    assert verdict["bad"] is True
    assert verdict["advice"][0]["command"].startswith(f"fastprune finetune {learnt} --data ")
    assert "worse than before" in (tmp_path / "out/fastprune/report.html").read_text()
    assert "verdict: worse than before" in (tmp_path / "out/fastprune/run.log").read_text()


def test_a_gate_of_ones_own_says_how_much_worse_it_may_be(finetune, learnt, tmp_path):
    status, _, stderr = finetune(*WORSE, "--gate-ppl-ratio", "1e9", source=learnt)
    assert status == 0, stderr
    assert metrics_of(tmp_path / "out")["verdict"]["bad"] is True
    status, _, stderr = finetune("--gate-ppl-ratio", "2", "--keep-worse", out="other")
    assert status == 2
    assert "--gate-ppl-ratio forbids what --keep-worse allows" in stderr


@pytest.fixture
def answers(tmp_path):
    file = tmp_path / "answers.jsonl"
    records = [
        {"instruction": f"Say {word}.", "output": f"{word} {word}!"} for word in TEXT.split()[:24]
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_answers_are_not_judged_by_another_text(finetune, learnt, answers, tmp_path):
    """It writes plain text less well, and was to learn something else: written, with a warning."""
    flags = ("--max-steps", "8", "--lr", "1e-2", "--val-size", "6")
    status, _, stderr = finetune(*flags, source=learnt, data=answers)
    assert status == 0, stderr
    metrics = metrics_of(tmp_path / "out")
    p, losses = metrics["perplexity"][0], metrics["validation"]
    assert p["before"] < p["after"] < EXPLODED * p["before"]
    assert losses["after"] < losses["before"]
    assert metrics["verdict"]["what"].startswith(f"perplexity {p['after']:.2f}")
    assert "which is not what was taught" in stderr
    gate = ("--gate-ppl-ratio", "1")
    assert finetune(*flags, *gate, source=learnt, data=answers, out="strict")[0] == 3


def test_answers_that_ruin_a_model_are_not_written(finetune, learnt, answers, tmp_path):
    status, _, stderr = finetune(*WORSE, source=learnt, data=answers)
    assert status == 3
    assert "perplexity went from" in stderr and "made the model worse" in stderr
    status, _, stderr = finetune(*WORSE, "--val-size", "6", source=learnt, data=answers, out="b")
    assert status == 3
    assert "validation loss" in stderr and "made the model worse" in stderr
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("after", "answers", "validation", "worse"),
    [
        (21.0, False, None, True),
        (19.0, False, None, False),
        (21.0, True, None, False),
        (201.0, True, None, True),
        (float("nan"), True, None, True),
        (21.0, True, (2.0, 1.9), False),
        (19.0, True, (2.0, 2.1), True),
        (19.0, True, (2.0, 2.001), False),
    ],
)
def test_what_counts_as_harm(after, answers, validation, worse):
    trained = Trained(20.0, after, Figures(None, None), 0.0, None, answers, validation)
    assert trained.worse is worse


@pytest.mark.parametrize(
    ("after", "passed"), [(37.41, True), (37.42, True), (37.5, False), (float("inf"), False)]
)
def test_a_gate_takes_no_rounding_for_a_rise(after, passed):
    assert gate_passed(Stage(gate=1.0), 37.41, after) is passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rate_out_of_all_proportion_is_numerical_trouble(finetune, tmp_path, dtype):
    """Norms make all large weights alike: the loss is that of guessing, and finite."""
    status, _, stderr = finetune("--max-steps", "3", "--lr", "1000", "--dtype", dtype)
    assert status == 4
    message = stderr.splitlines()[-1]
    assert "Lower --lr" in message and "Raise" not in message
    assert not (tmp_path / "out/config.json").exists()


def test_the_dense_model_travels_with_every_checkpoint(finetune, learnt, text, held_out, tmp_path):
    """prune → finetune by LoRA → merge → finetune → diagnose: judged by the dense figure."""
    measured = ["--eval", str(held_out), "--eval-seq-len", "32", "--eval-windows", "2"]
    cut = ["--ratio", "0.3", "--calib", str(text), "--calib-samples", "4", "--calib-seq-len", "32"]
    pruned, adapter, merged = (tmp_path / name for name in ("pruned", "adapter", "merged"))
    assert cli.main(["prune", str(learnt), "--out", str(pruned), *cut, *measured, "--quiet"]) == 0
    record = metrics_of(pruned)
    p = record["perplexity"][0]
    assert record["verdict"]["advice"]
    origin = Origin.of(pruned)
    key = (p["text"], 32, 2)
    assert origin.dense == str(learnt)
    assert origin.removed == pytest.approx(record["ratio"]["achieved"], rel=1e-12)
    assert vars(origin.figures(key)) == {"dense": p["before"], "pruned": p["after"]}

    lora = ("--method", "lora", "--max-steps", "6", "--lr", "1e-2")
    status, stdout, stderr = finetune(*lora, source=pruned, out="adapter")
    assert status == 0, stderr
    assert "of what pruning cost is made good" in stdout
    assert f"fastprune merge {pruned} --adapter {adapter}" in stdout
    merge = ["merge", str(pruned), "--adapter", str(adapter), "--out", str(merged), "--quiet"]
    assert cli.main(merge) == 0
    status, stdout, stderr = finetune("--max-steps", "4", source=merged)
    assert status == 0, stderr
    assert Origin.of(merged) == Origin.of(adapter) == Origin.of(tmp_path / "out") == origin

    file = tmp_path / "diagnosis.json"
    flags = ["--text", str(held_out), "--seq-len", "32", "--windows", "2", "--json", str(file)]
    cli.main(["diagnose", str(tmp_path / "out"), *flags, "--quiet"])
    judged = json.loads(file.read_text())["perplexity"]
    assert judged["by"].startswith(f"×{judged['perplexity'] / p['before']:.3g} of the dense one")


def test_a_broken_model_is_named_before_the_first_step(finetune):
    _, _, stderr = finetune("--max-steps", "2")  # random weights
    before, _, after = stderr.partition("no better than guessing among all 300 tokens")
    assert "step 1 of 2" in after and "step 1 of 2" not in before


def test_each_epoch_ends_with_a_line(finetune):
    flags = ["--samples", "12", "--epochs", "2", "--val-size", "4"]
    status, _, stderr = finetune(*flags)
    assert status == 0, stderr
    lines = re.findall(
        r"epoch (\d) ends, step (\d): mean loss (\S+), validation loss (\S+) "
        r"\(perplexity (\S+)\), lr \S+",
        stderr,
    )
    assert [(epoch, step) for epoch, step, *_ in lines] == [("1", "3"), ("2", "6")]
    (_, _, first, loss, perplexity), (_, _, second, *_) = lines
    assert float(second) < float(first)
    # four digits of the loss
    assert float(perplexity) == pytest.approx(torch.tensor(float(loss)).exp().item(), rel=1e-3)


def test_the_effective_batch_is_said(finetune):
    _, _, stderr = finetune("--max-steps", "1")
    assert "(2 a pass, 2 passes a step, 4 samples a step)" in stderr
    assert "usual for learning answers" not in stderr  # it is text


def test_unusual_settings_for_answers_are_said(finetune, tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(80)]
    path.write_text("\n".join(map(json.dumps, records)))
    _, _, stderr = finetune("--max-steps", "1", "--keep-worse", data=path)
    assert (
        "usual for learning answers: a warm-up of 10–15 % of the steps, here 5 % "
        "(--warmup-ratio 0.12); 64–96 samples a step, here 4 (--grad-accum 32)" in stderr
    )


def test_usual_settings_need_no_advice():
    usual = Stage(warmup_ratio=0.12, batch_size=8, grad_accum=8)
    assert StepCounts(usual, 1000).unusual_for_answers() == []
    few = StepCounts(Stage(warmup_ratio=0.12), 40)  # too few samples for 64 a step
    assert few.unusual_for_answers() == []
    long = StepCounts(Stage(warmup_steps=50, grad_accum=16, max_steps=100), 1000)
    (found,) = long.unusual_for_answers()
    assert "here 50 %" in found


@pytest.mark.parametrize("chat", [False, True])
def test_generate_says_why_it_says_nothing(tmp_path, capsys, chat):
    folder = tiny_checkpoint(tmp_path / "model", tied=False)
    model = tiny_model("llama", tied=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are alike: the first token, 0, is the end
    model.save_pretrained(folder)
    flags = ["--prompt", "The river", *(["--chat"] if chat else [])]
    assert cli.main(["generate", str(folder), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "nothing was generated: the first token was one that ends a text" in captured.err
    assert ("--chat" in captured.err) is not chat
