"""DATA to items, masks and batches."""

import copy
import json

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from read_data import training_data
from tiny import TEXT, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from fastprune.data.encode import Encoder
from fastprune.data.instruct import end_of_turn, prompt_text
from fastprune.data.training import Collator
from fastprune.errors import InputError
from fastprune.kernels.reference import IGNORED

END = "<|end|>"
ENGLISH = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3, of course."}
CHINESE = {"instruction": "识别给定列表中的理论。", "input": "", "output": "细胞理论和日心说。"}
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who built the dam?"},
    {"role": "assistant", "content": "Nobody remembers."},
    {"role": "user", "content": "And the mill?"},
    {"role": "assistant", "content": "The miller."},
]


@pytest.fixture
def tokenizer():
    return copy.deepcopy(tiny_tokenizer())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastprune"


def write(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def whole(tokenizer, item):
    return tokenizer.decode(item["input_ids"])


def learnt(tokenizer, item):
    """The learnt parts of an item."""
    labels = item["labels"]
    assert torch.equal(labels[labels != IGNORED], item["input_ids"][labels != IGNORED])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels != IGNORED, [0]])))
    return [tokenizer.decode(labels[a:b]) for a, b in zip(edges[::2], edges[1::2])]


def problems(data):
    return {finding.problem: (finding.count, finding.first) for finding in data.findings}


def test_text_is_one_stream_whose_documents_end(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "one mill"}, {"text": "two"}, {"text": TEXT}])
    data = training_data(path, tokenizer, seq_len=16)
    ids = tokenizer(f"one mill{END}two{END}{TEXT}{END}").input_ids
    assert data.kind == "text"
    assert len(data.train) == len(ids) // 16
    for n in range(len(data.train)):
        item = data.train[n]
        assert item["input_ids"].tolist() == ids[16 * n : 16 * (n + 1)]
        assert torch.equal(item["labels"], item["input_ids"])
        assert item["input_ids"].dtype == torch.int64
    assert data.lengths["document"].total == len(ids)
    assert data.lengths["document"].count == 3


def test_documents_on_their_own_keep_their_rest(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["one mill".join('""'), json.dumps(TEXT)])
    data = training_data(path, tokenizer, seq_len=16, pack=False)
    pieces = [data.train[n]["input_ids"] for n in range(len(data.train))]
    assert whole(tokenizer, data.train[0]) == f"one mill{END}"
    assert tokenizer.decode(torch.cat(pieces[1:])) == TEXT + END
    assert {len(piece) for piece in pieces[1:-1]} == {16}


def test_a_text_shorter_than_a_window_is_one_item(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", ["the mill"])
    data = training_data(path, tokenizer, seq_len=512)
    assert [whole(tokenizer, data.train[n]) for n in range(len(data.train))] == [f"the mill{END}"]


def test_instruct_models_keep_their_own_end_of_document(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    data = training_data(write(tmp_path / "a.txt", ["the mill"]), tokenizer, seq_len=512)
    assert whole(tokenizer, data.train[0]) == "the mill<|endoftext|>"


def test_alpaca_wording(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ENGLISH, CHINESE]), encoding="utf-8")
    data = training_data(path, tokenizer, seq_len=2048)
    assert data.kind == "instructions"
    english, chinese = data.train[0], data.train[1]
    assert whole(tokenizer, english).endswith(
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n"
        f"3, of course.{END}"
    )
    assert "paired with an input" in whole(tokenizer, english)
    assert learnt(tokenizer, english) == [f"3, of course.{END}"]
    assert whole(tokenizer, chinese).endswith(
        f"### 指令：\n识别给定列表中的理论。\n\n### 回答：\n细胞理论和日心说。{END}"
    )
    assert learnt(tokenizer, chinese) == [f"细胞理论和日心说。{END}"]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Ask.", "context": "here", "response": "Told.", "category": "qa"},
        {"prompt": "Ask.\n\nhere", "response": "Told."},
        {"question": "Ask.\n\nhere", "answer": "Told."},
        {"messages": [{"role": "user", "content": "Ask.\n\nhere"},
                      {"role": "assistant", "content": "Told."}]},
        {"conversations": [{"from": "human", "value": "Ask.\n\nhere"},
                           {"from": "gpt", "value": "Told."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ask.\n\nhere"}]},
                      {"role": "assistant", "content": "Told."},
                      {"role": "user", "content": "never answered"}]},
    ],
)  # fmt: skip
def test_every_form_says_the_same_through_a_template(tmp_path, tokenizer, record):
    tokenizer.chat_template = TEMPLATE
    data = training_data(write(tmp_path / "a.jsonl", [record]), tokenizer, seq_len=512)
    text = f"<|user|>\nAsk.\n\nhere\n<|assistant|>\nTold.{END}\n"
    assert whole(tokenizer, data.train[0]) == text
    assert learnt(tokenizer, data.train[0]) == [f"Told.{END}"]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_only_the_assistant_is_learnt(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    data = training_data(write(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer, seq_len=512)
    assert data.kind == "chat"
    item = data.train[0]
    assert learnt(tokenizer, item) == [f"Nobody remembers.{END}", f"The miller.{END}"]
    # what comes before an answer is read exactly as it is when the model answers
    prompt = tokenizer.apply_chat_template(
        CHAT[:-1], add_generation_prompt=True, return_dict=True
    ).input_ids
    assert item["input_ids"][: len(prompt)].tolist() == prompt
    assert data.findings == []


def test_a_template_without_an_end_gets_one(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "")
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    item = training_data(path, tokenizer, seq_len=512).train[0]
    assert learnt(tokenizer, item) == ["Nobody remembers.", f"The miller.{END}"]


def test_a_template_that_rewrites_the_past_teaches_the_last_answer(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "m.content", "(m.content if loop.last or m.role != 'assistant' else '...')"
    )
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    data = training_data(path, tokenizer, seq_len=512)
    assert learnt(tokenizer, data.train[0]) == [f"The miller.{END}"]
    assert problems(data) == {"last answer only": (1, f"{path}: line 1")}


def test_a_conversation_without_a_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    item = training_data(path, tokenizer, seq_len=512).train[0]
    assert whole(tokenizer, item).startswith("Be brief.\n\n### Instruction:\nWho built the dam?")
    assert learnt(tokenizer, item) == [f"Nobody remembers.{END}", f"The miller.{END}"]


def test_a_tokenizer_that_begins_every_text_does_so_once(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    path = write(tmp_path / "a.jsonl", [ENGLISH])
    item = training_data(path, tokenizer, seq_len=512).train[0]
    assert item["input_ids"].tolist().count(begin) == 1
    assert item["input_ids"][0] == begin and item["labels"][0] == IGNORED
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    item = training_data(path, tokenizer, seq_len=512).train[0]
    assert whole(tokenizer, item).startswith("<|begin|><|user|>\nAdd")
    assert learnt(tokenizer, item) == [f"3, of course.{END}"]
    text = write(tmp_path / "b.jsonl", [{"text": "one"}, {"text": "two"}])
    item = training_data(text, tokenizer, seq_len=512).train[0]
    assert whole(tokenizer, item) == f"<|begin|>one{END}<|begin|>two{END}"


def test_every_window_of_a_text_begins_as_a_text_does(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    path = write(tmp_path / "a.jsonl", [json.dumps(TEXT), json.dumps(TEXT[::-1])])
    data = training_data(path, tokenizer, seq_len=16).train
    windows = [data[n]["input_ids"].tolist() for n in range(len(data))]
    assert all(window[0] == begin for window in windows)
    assert len(windows[0]) == 15, "it has its own"
    assert {len(window) for window in windows[1:]} == {16}
    assert [len(window) for window in windows] == data.lengths.tolist()
    read = [token for window in windows for token in window]
    text = tokenizer(f"{TEXT}{END}<|begin|>{TEXT[::-1]}{END}", add_special_tokens=False).input_ids
    rest = [token for token in text if token != begin]
    assert [token for token in read if token != begin] == rest[: len(read) - read.count(begin)]


@pytest.mark.parametrize("template", [None, TEMPLATE, MARKED])
def test_a_tokenizer_without_offsets_masks_the_same(tmp_path, template):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not tokenizer.is_fast
    tokenizer.chat_template = template and template.replace(END, "</s>")
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    item = training_data(path, tokenizer, seq_len=1024).train[0]
    assert learnt(tokenizer, item) == ["Nobody remembers.</s>", "The miller.</s>"]


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m.role == 'tool' %}{{ raise_exception('no tool role') }}{% endif %}{% endfor %}"
)


def test_a_template_that_refuses_a_conversation_is_a_finding(tmp_path, tokenizer):
    tokenizer.chat_template = REFUSING + TEMPLATE
    tool = [*CHAT[1:4], {"role": "tool", "content": "42"}, CHAT[4]]
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT[1:]}, {"messages": tool}])
    data = training_data(path, tokenizer, seq_len=512)
    assert problems(data) == {"template": (1, f"{path}: line 2")}
    assert data.findings[0].reason == "no tool role"
    assert len(data.train) == 1
    with pytest.raises(InputError, match=r"left out.*\(no tool role\)"):
        training_data(write(tmp_path / "b.jsonl", [{"messages": tool}]), tokenizer, seq_len=512)


def test_a_system_message_that_is_refused_heads_the_first_question(tmp_path, tokenizer):
    tokenizer.chat_template = REFUSING + TEMPLATE
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    item = training_data(path, tokenizer, seq_len=512).train[0]
    assert whole(tokenizer, item).startswith("<|user|>\nBe brief.\n\nWho built the dam?\n<|assis")
    assert learnt(tokenizer, item) == [f"Nobody remembers.{END}", f"The miller.{END}"]


THINKING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content.split('</think>')[-1].strip() }}"
    "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("answer", "taught"),
    [
        ("Nobody.", "\n</think>\n\nNobody."),
        ("<think>\nA dam?\n</think>\n\nNobody.", "A dam?\n</think>\n\nNobody."),
        ("A dam?\n</think>\n\nNobody.", "A dam?\n</think>\n\nNobody."),
    ],
)
def test_a_prompt_that_ends_in_a_thinking_mark(tmp_path, tokenizer, answer, taught):
    tokenizer.chat_template = THINKING
    path = write(tmp_path / "a.jsonl", [{"prompt": "Who built the dam?", "response": answer}])
    item = training_data(path, tokenizer, seq_len=512).train[0]
    asked = Encoder(tokenizer, seq2seq=False).prompt("Who built the dam?", "instructions")
    assert item["input_ids"][: len(asked)].tolist() == asked
    assert tokenizer.decode(asked).endswith("<think>\n")
    assert learnt(tokenizer, item) == [f"{taught}{END}"]


def test_templates_that_exist_only_by_name(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    marked = {"default": TEMPLATE, "tools": "{{ raise_exception('tools alone') }}"}
    for templates in (marked, {"only": TEMPLATE}, {"default": MARKED, "tools": TEMPLATE}):
        tokenizer.chat_template = templates
        item = training_data(path, tokenizer, seq_len=512).train[0]
        assert learnt(tokenizer, item) == [f"Nobody remembers.{END}", f"The miller.{END}"]
        assert whole(tokenizer, item).startswith("<|system|>\nBe brief.")
    tokenizer.chat_template = {"rag": TEMPLATE, "tools": TEMPLATE}
    with pytest.raises(InputError, match="templates named rag, tools and none named default"):
        training_data(path, tokenizer, seq_len=512)


def test_the_token_that_ends_a_turn(tokenizer):
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|eot|>")
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "\\n<|eot|>")
    assert end_of_turn(tokenizer) == turn
    for template in (TEMPLATE.replace(END, ""), "{{ raise_exception('no one may speak') }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_prompts_are_put_as_in_training(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [ENGLISH])
    asked = [{"role": "user", "content": ENGLISH["instruction"]}]
    for template in (None, TEMPLATE):
        tokenizer.chat_template = template
        item = training_data(path, tokenizer, seq_len=512).train[0]
        prompt = prompt_text(tokenizer, asked, ENGLISH["input"])
        assert tokenizer.decode(item["input_ids"][item["labels"] == IGNORED]).startswith(prompt)
        assert prompt.endswith("Response:\n" if template is None else "<|assistant|>\n")


@pytest.mark.parametrize("template", [None, TEMPLATE, MARKED, "{{ bos_token }}" + TEMPLATE])
def test_a_prompt_is_the_beginning_of_its_training_item(tmp_path, tokenizer, template):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer.chat_template = template
    path = write(tmp_path / "a.jsonl", [{"prompt": "Who built the dam?", "response": "Nobody."}])
    item = training_data(path, tokenizer, seq_len=512).train[0]
    asked = Encoder(tokenizer, seq2seq=False).prompt("Who built the dam?", "instructions")
    assert asked == item["input_ids"][item["labels"] == IGNORED].tolist()[: len(asked)]
    assert item["labels"][len(asked)] != IGNORED
    assert Encoder(tokenizer, seq2seq=False).prompt("The river", "text") == "The river"
    assert Encoder(tokenizer, seq2seq=True).prompt("The river", "chat") == "The river"


def test_long_examples_keep_the_start_of_the_response(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    answers = [("Short?", TEXT), (TEXT, TEXT[::-1]), (TEXT, "Yes."), ("Short?", "Yes.")]
    records = [{"prompt": prompt, "response": response} for prompt, response in answers]
    path = write(tmp_path / "a.jsonl", records)
    data = training_data(path, tokenizer, seq_len=64)
    items = [data.train[n] for n in range(4)]
    assert [len(item["input_ids"]) for item in items[:3]] == [64, 64, 64]
    assert whole(tokenizer, items[0]).startswith("<|user|>\nShort?")
    assert TEXT.startswith(learnt(tokenizer, items[0])[0])
    assert TEXT[::-1].strip().startswith(learnt(tokenizer, items[1])[0])
    assert (items[1]["labels"] == IGNORED).sum() == 48  # three quarters
    assert learnt(tokenizer, items[2]) == [f"Yes.{END}"]
    assert problems(data) == {"over-long": (3, f"{path}: line 1")}
    assert data.lengths["example"].over == 0.75
    assert data.lengths["example"].max > 64
    assert data.train.lengths.tolist() == [len(item["input_ids"]) for item in items]


def test_encoder_decoder_items(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    table = {"prompt": ["你好，你是谁？", TEXT, None], "response": ["我是一个模型。", TEXT, "x"]}
    parquet.write_table(pyarrow.table(table), path)
    data = training_data(path, tokenizer, seq_len=96, seq2seq=True)
    first, second = data.train[0], data.train[1]
    assert whole(tokenizer, first) == f"你好，你是谁？{END}"
    assert tokenizer.decode(first["labels"]) == f"我是一个模型。{END}"
    assert len(second["input_ids"]) == len(second["labels"]) == 96
    assert second["input_ids"][-1] == tokenizer.eos_token_id
    assert TEXT.startswith(tokenizer.decode(second["labels"]))
    assert problems(data) == {
        "null": (1, f"{path}: record 3"),
        "over-long": (1, f"{path}: record 2"),
    }
    batch = Collator(pad_id=7)([first, second])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 96)
    assert batch["labels"][0, len(first["labels"]) :].unique().tolist() == [IGNORED]
    with pytest.raises(InputError, match="plain text, and an encoder–decoder"):
        training_data(write(tmp_path / "b.txt", ["text"]), tokenizer, seq_len=8, seq2seq=True)


def test_batches_are_padded_on_the_right():
    items = [{"input_ids": torch.arange(1, n + 1), "labels": torch.arange(n)} for n in (3, 5)]
    batch = Collator(pad_id=9)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[0, 1, 2, IGNORED, IGNORED], [0, 1, 2, 3, 4]]
    assert Collator(None, multiple_of=4)(items)["input_ids"].shape == (2, 8)


def numbered(tmp_path, n, name="n.jsonl"):
    records = [{"prompt": f"Number {i}?", "response": f"{i}."} for i in range(n)]
    return write(tmp_path / name, records)


def answers(tokenizer, dataset):
    return [learnt(tokenizer, dataset[n])[0].removesuffix(f".{END}") for n in range(len(dataset))]


def test_validation_is_held_out_by_the_seed(tmp_path, tokenizer):
    path = numbered(tmp_path, 40)

    def split(**options):
        data = training_data(path, tokenizer, seq_len=512, **options)
        return answers(tokenizer, data.train), answers(tokenizer, data.validation)

    train, held = split(val_size=8, seed=3)
    assert len(held) == 8
    assert sorted(train + held, key=int) == [str(n) for n in range(40)]
    assert split(val_size=0.2, seed=3) == (train, held)
    assert split(val_size=8, seed=4)[1] != held
    fewer, again = split(val_size=8, seed=3, samples=10)
    assert again == held
    assert len(fewer) == 10 and set(fewer) <= set(train)
    assert split(val_size=8, seed=3, samples=6)[0] == fewer[:6]
    assert training_data(path, tokenizer, seq_len=512).validation is None


def test_sources_of_different_kinds_mix(tmp_path, tokenizer):
    text = write(tmp_path / "a.txt", [TEXT])
    data = training_data(f"{numbered(tmp_path, 5)},{text}", tokenizer, seq_len=32)
    assert data.kind == "mixed"
    assert set(data.lengths) == {"document", "example", "prompt", "response"}
    items = [data.train[n] for n in range(len(data.train))]
    assert learnt(tokenizer, items[4]) == [f"4.{END}"]
    joined = torch.cat([item["input_ids"] for item in items[5:]])
    assert TEXT.startswith(tokenizer.decode(joined))
    assert [len(item["input_ids"]) for item in items] == data.train.lengths.tolist()


def test_a_given_kind_is_kept(tmp_path, tokenizer):
    record = {"text": "the mill", "prompt": "Who?", "response": "Nobody."}
    path = write(tmp_path / "a.jsonl", [record])
    assert training_data(path, tokenizer, seq_len=64).kind == "instructions"
    data = training_data(path, tokenizer, seq_len=64, kind="text")
    assert whole(tokenizer, data.train[0]) == f"the mill{END}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "at least 2"),
        ({"samples": 0}, "at least 1"),
        ({"val_size": -1}, "val_size"),
        ({"val_size": 1.5}, "val_size"),
        ({"val_size": 5}, "leaves nothing to train on"),
        ({"kind": "pairs"}, "text, instructions, chat"),
        ({"kind": "chat"}, "5 × wrong fields"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(InputError, match=message) as error:
        training_data(numbered(tmp_path, 5), tokenizer, **{"seq_len": 64} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (["{"], "none that can be read"),
        ([" "], "no text in it"),
        (['{"label": 1}'], "it has label"),
        (["[]", "1"], "no fields"),
        ([{"prompt": "", "response": "x"}], "1 × empty prompt"),
        ([{"text": None}, {"text": " "}], "1 × null.*; 1 × empty text"),
    ],
)
def test_data_without_a_use_is_refused(tmp_path, tokenizer, cache, records, message):
    with pytest.raises(InputError, match=message) as error:
        training_data(write(tmp_path / "a.jsonl", records), tokenizer, seq_len=64)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_the_report_of_the_data_is_json(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [ENGLISH, CHINESE, CHINESE])
    data = training_data(path, tokenizer, seq_len=512, val_size=1)
    content = json.loads(json.dumps(data.to_dict()))
    assert content["records"] == 3
    assert content["train"] == content["validation"] == 1
    assert content["findings"][0]["problem"] == "duplicate"
    assert content["lengths"]["prompt"]["count"] == 2
