"""GPT-2 and T5 are finetuned like the others; T5's loss is its own, and BLEU chooses its best."""

import json

import pytest
import torch
from tiny import saved, tiny_gpt2, tiny_model, tiny_t5, tiny_tokenizer, token_ids
from torch.nn.functional import cross_entropy

from fastprune.data.training import Collator
from fastprune.errors import InputError
from fastprune.models.load import load_model
from fastprune.recover.batches import Counted
from fastprune.recover.distill import Distiller
from fastprune.recover.objective import Objective

PAIRS = [
    {"prompt": f"{question} {number}", "response": answer}
    for number in range(12)
    for question, answer in (("Who built the dam?", "Nobody"), ("What freezes?", "The river"))
]


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


def log_of(out, figure):
    lines = map(json.loads, (out / "fastprune" / "train_log.jsonl").read_text().splitlines())
    return {line["step"]: line[figure] for line in lines if figure in line}


def test_the_loss_of_t5_is_its_own():
    model = tiny_t5(dropout_rate=0.0)
    samples = [
        {"input_ids": ids[:prompt], "labels": ids[prompt:]}
        for ids, prompt in zip(token_ids(3, 20), (12, 7, 9), strict=True)
    ]
    batch = Counted(Collator(0), aligned=True)(samples)
    items = batch.pop("items")
    assert items == sum(len(sample["labels"]) for sample in samples)
    batch.pop("tokens")
    objective = Objective(model)
    objective(batch, items).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(**batch).logits
    loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    total, count = objective.plain(batch)
    assert (total / count).item() == pytest.approx(loss.item(), rel=1e-5)  # fp32 sums
    for name, parameter in model.named_parameters():
        # the same fp32 products, summed in other chunks
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_encoder_decoder_models_are_not_distilled():
    teacher = Distiller(tiny_model("llama"), weight=0.5, temperature=1.0)
    with pytest.raises(InputError, match="cannot be distilled"):
        Objective(tiny_t5(), None, teacher)


def test_t5_needs_pairs(finetune, tmp_path):
    status, _, stderr = finetune(source=saved(tmp_path / "t5", tiny_t5()))
    assert status == 2
    assert "plain text, and an encoder–decoder model learns from prompts with responses" in stderr


def test_t5_learns_pairs_and_bleu_chooses(finetune, tmp_path, pairs):
    model = saved(tmp_path / "t5", tiny_t5())
    flags = ["--epochs", "2", "--lr", "2e-2", "--val-size", "4", "--eval-steps", "5"]
    flags += ["--bleu-samples", "3", "--best-by", "bleu", "--prompt", "Who built the dam?"]
    status, _, stderr = finetune(*flags, source=model, data=pairs)
    assert status == 0, stderr
    out = tmp_path / "out"
    stage = json.loads((out / "fastprune" / "metrics.json").read_text())["stages"][0]
    measured = log_of(out, "eval_bleu")
    assert set(measured) == {5, 10}
    best = max(measured, key=measured.get)  # the first of equal ones
    assert stage["best"] == {"step": best, "figure": measured[best], "by": "bleu"}
    assert (stage["bleu"]["pairs"], stage["bleu"]["tokenizer"]) == (3, "13a")
    report = (out / "fastprune" / "report.html").read_text()
    assert f"best evaluation {measured[best]:.4f} (by bleu) at step {best}." in report
    assert f"BLEU-4 {measured[10]:.3f} (target 0.15) of 3 answers at step 10" in report
    losses = log_of(out, "eval_loss")
    assert losses[10] < losses[5]
    loaded, _ = load_model(out)
    assert loaded.config.model_type == "t5"


def test_a_gpt2_file_learns_text(finetune, tmp_path):
    state = tiny_gpt2().state_dict()
    torch.save({"model": state, "config": {"n_head": 4}}, tmp_path / "gpt2.pt")
    tiny_tokenizer().save_pretrained(tmp_path)
    flags = ["--max-steps", "4", "--bleu-samples", "3", "--val-size", "2", "--eval-steps", "2"]
    status, _, stderr = finetune(*flags, source=tmp_path / "gpt2.pt")
    assert status == 0, stderr
    assert "the data is text, without prompts and answers: no BLEU" in stderr
    found = json.loads((tmp_path / "out" / "fastprune" / "metrics.json").read_text())
    assert found["perplexity"][0]["after"] < found["perplexity"][0]["before"]
    assert found["stages"][0]["bleu"] is None
    loaded, _ = load_model(tmp_path / "out")
    assert loaded.config.model_type == "gpt2"
    assert not torch.equal(loaded.transformer.wte.weight, state["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bleu-samples", "3"], "give --val-size and --eval-steps"),
        (["--best-by", "bleu"], "give --bleu-samples"),
    ],
)
def test_bleu_without_what_it_needs_is_refused(finetune, flags, words):
    status, _, stderr = finetune(*flags)
    assert status == 2
    assert words in stderr
