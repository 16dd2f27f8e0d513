"""Tasks of lm-evaluation-harness on a model in memory, from a local folder."""

import json
import math
import sys

import pytest
import torch
from counting import keeping
from tiny import TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer

from fastprune import cli
from fastprune.errors import InputError
from fastprune.inspect import tasks
from fastprune.inspect.tasks import TaskOptions, evaluate_tasks
from fastprune.models.families import geometries
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.surgery import apply_plan

harness = pytest.importorskip("lm_eval", reason="needs the extra eval")

QUESTION = "Question: What freezes in winter?"
CHOICES = ["The wheel", "The mill of the miller", "sacks"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = [{"query": QUESTION, "choices": CHOICES, "gold": gold, "id": gold} for gold in range(3)]
    (folder / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, items)))
    passages = [{"context": "The river runs past the old", "continuation": "mill"}]
    (folder / "lambada.jsonl").write_text("\n".join(map(json.dumps, passages)))
    return folder


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """Of the tokens of `continuation` after `context`, and whether each is the likeliest."""
    tokenizer = tiny_tokenizer()
    start = tokenizer(context)["input_ids"]
    whole = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    logits = model(input_ids=whole).logits[0, len(start) - 1 : -1].log_softmax(-1)
    target = whole[0, len(start) :]
    greedy = bool((logits.argmax(-1) == target).all())
    return logits.gather(1, target[:, None]).sum().item(), greedy


def test_accuracies_are_those_of_the_likelihoods(model, data):
    options = TaskOptions(tasks=("arc_easy", "lambada"), tasks_data=data)
    results = evaluate_tasks(model, tiny_tokenizer(), options, seed=7)
    context = f"{QUESTION}\nAnswer:"
    sums = [log_likelihood(model, context, f" {choice}")[0] for choice in CHOICES]
    by_length = [value / len(choice) for value, choice in zip(sums, CHOICES)]
    assert sums.index(max(sums)) != by_length.index(max(by_length)), "the two accuracies differ"
    arc = results["arc_easy"]
    assert (arc["items"], arc["fewshot"], arc["seed"]) == (3, 0, 7)
    # each choice is the right one once
    for metric in ("acc", "acc_norm"):
        assert arc["metrics"][metric]["value"] == pytest.approx(1 / 3)
        assert arc["metrics"][metric]["stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))
    _, greedy = log_likelihood(model, "The river runs past the old", " mill")
    assert results["lambada"]["metrics"]["acc"]["value"] == greedy


@pytest.mark.parametrize("gold", range(len(CHOICES)))
def test_the_right_choice_is_the_gold_one(model, data, gold):
    item = {"query": QUESTION, "choices": CHOICES, "gold": gold}
    (data / "piqa.jsonl").write_text(json.dumps(item))
    options = TaskOptions(tasks=("piqa",), tasks_data=data)
    metrics = evaluate_tasks(model, tiny_tokenizer(), options)["piqa"]["metrics"]
    context = f"{QUESTION}\nAnswer:"
    sums = [log_likelihood(model, context, f" {choice}")[0] for choice in CHOICES]
    by_length = [value / len(choice) for value, choice in zip(sums, CHOICES)]
    assert metrics["acc"]["value"] == (sums.index(max(sums)) == gold)
    assert metrics["acc_norm"]["value"] == (by_length.index(max(by_length)) == gold)


def test_limits_and_examples_and_what_is_left_alone(model, data, capsys):
    options = TaskOptions(tasks=("arc_easy",), tasks_data=data, task_limit=2, task_fewshot=1)
    state = torch.get_rng_state()
    model.train()
    try:
        result = evaluate_tasks(model, tiny_tokenizer(), options)["arc_easy"]
        assert model.training
    finally:
        model.eval()
    assert (result["items"], result["fewshot"]) == (2, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_a_task_file_of_the_users_own_on_a_model_of_different_layers(data, tmp_path):
    model = tiny_model("llama")
    sizes = tuple(geometries(model))
    whole = keep_all(sizes).layers[1:]
    apply_plan(model, Plan(sizes, (keeping(0, (1, 3), tuple(range(40))), *whole)))
    file = tmp_path / "river.yaml"
    items = tmp_path / "river.jsonl"
    items.write_text(json.dumps({"question": "What turns?", "options": ["a", "b"], "answer": 1}))
    file.write_text(
        f"task: river\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {items}}}, "
        f"cache_dir: {tmp_path}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: question\n"
        "doc_to_target: answer\ndoc_to_choice: options\n"
    )
    result = evaluate_tasks(model, tiny_tokenizer(), TaskOptions(tasks=(str(file),)))
    assert result["river"]["metrics"]["acc"]["value"] in (0, 1)


def test_the_command_prints_and_writes_tasks(data, tmp_path, capsys):
    checkpoint = tiny_checkpoint(tmp_path / "model")
    text, file = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(TEXT * 10)
    flags = ["--text", str(text), "--seq-len", "32", "--windows", "1", "--json", str(file)]
    flags += ["--tasks", "arc_easy", "--tasks-data", str(data)]
    assert cli.main(["eval", str(checkpoint), *flags]) == 0
    result = json.loads(file.read_text())
    assert result["tasks"]["arc_easy"]["metrics"]["acc"]["value"] == pytest.approx(1 / 3)
    printed = capsys.readouterr().out
    assert "arc_easy" in printed
    assert "0.3333" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ("gone.yaml",)}, "gone.yaml: no such task file"),
        ({"tasks": ("piqa",), "tasks_data": "DATA"}, "piqa.jsonl is not there"),
        ({"tasks": ("lambada",), "tasks_data": "DATA"}, "the fields context, continuation"),
        ({"tasks": ("piqa",), "tasks_data": "nowhere"}, "no such folder"),
        ({"tasks": ("piqa",), "task_limit": 0}, "at least 1"),
        ({"tasks": ("piqa",), "task_fewshot": -1}, "at least 0"),
    ],
)
def test_refusals(model, data, tmp_path, options, words):
    (data / "lambada.jsonl").write_text('{"text": "a"}')
    if "tasks_data" in options:
        folder = data if options["tasks_data"] == "DATA" else tmp_path / "nowhere"
        options = options | {"tasks_data": folder}
    with pytest.raises(InputError, match=words) as error:
        evaluate_tasks(model, tiny_tokenizer(), TaskOptions(**options))
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_looked_up_among_all_tasks(model, monkeypatch):
    asked = []

    def index(*, whole):  # the true one of all tasks takes long to make
        asked.append(whole)
        return harness.tasks.TaskManager(include_defaults=False)

    monkeypatch.setattr(tasks, "_index", index)
    with pytest.raises(InputError, match="no task of this name"):
        evaluate_tasks(model, tiny_tokenizer(), TaskOptions(tasks=("no_such_task",)))
    assert asked == [False, True]


def test_a_missing_harness_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", "anything", "--tasks", "piqa"]) == 2
    assert "pip install 'fastprune[eval]'" in capsys.readouterr().err
