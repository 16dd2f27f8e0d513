"""Generation is the model's own greedy or seeded choice; a chat remembers and ends."""

import copy

import pytest
import torch
from tiny import FAMILIES, tiny_checkpoint, tiny_gpt2, tiny_model, tiny_t5, tiny_tokenizer

from fastprune.data.encode import Encoder
from fastprune.errors import InputError, NumericalError
from fastprune.inspect.generate import (
    GenerateConfig,
    Generation,
    chat,
    generate,
    nothing_said,
    pad_token,
    run_generate,
    stop_at_end_of_turn,
)

PROMPT = "The river that runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_likeliest_token_each_time(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    result = generate(model, tokenizer, PROMPT, 6)
    assert result.text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert result.new_tokens == 6


def test_token_ids_are_taken_as_they_are():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer(PROMPT).input_ids
    result = generate(model, tokenizer, ids, 6)
    assert result.text == generate(model, tokenizer, PROMPT, 6).text
    assert result.prompt == PROMPT


def test_sampling_follows_the_seed_alone():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    state = torch.get_rng_state()
    first, again, other = (
        generate(model, tokenizer, PROMPT, 20, temperature=1.0, seed=seed).text
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_prompt_begins_with_the_start_token():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert generate(model, tokenizer, "", 4).text == generate(model, tokenizer, "<|end|>", 4).text


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        generate(tiny_model("llama"), tiny_tokenizer(), PROMPT, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_says_nothing(temperature):
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(NumericalError, match="NaN or Inf: the weights hold 64 NaN in"):
        generate(model, tiny_tokenizer(), PROMPT, 4, temperature=temperature)


def test_a_temperature_too_low_for_the_logits_is_told():
    with pytest.raises(NumericalError, match="divided by the temperature 1e-40: raise it"):
        generate(tiny_model("llama"), tiny_tokenizer(), PROMPT, 4, temperature=1e-40)


def test_run_generate_prints_the_continuation(tmp_path, capfd):
    folder = tiny_checkpoint(tmp_path / "model")
    capfd.readouterr()  # the progress bars of saving it
    result = run_generate(GenerateConfig(model=str(folder), prompt=PROMPT, max_new_tokens=5))
    assert capfd.readouterr() == (result.text + "\n", "")


def test_a_file_of_prompts(tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "model")
    file = tmp_path / "prompts.txt"
    file.write_text("The river\n\nThe mill\n")
    settings = {"model": str(folder), "max_new_tokens": 3}
    alone = [run_generate(GenerateConfig(prompt=p, **settings)) for p in ("The river", "The mill")]
    capsys.readouterr()
    result = run_generate(GenerateConfig(prompt=str(file), **settings))
    assert [g["text"] for g in result["generations"]] == [one.text for one in alone]
    first, second = alone
    assert capsys.readouterr().out == f"> The river\n{first.text}\n> The mill\n{second.text}\n"
    file.write_text("\n \n")
    with pytest.raises(InputError, match="no prompts in it"):
        run_generate(GenerateConfig(prompt=str(file), **settings))


def lines(*words):
    """A reader that gives `words` one by one, then ends."""
    rest = iter(words)

    def read(prompt):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def test_chat_ends_and_remembers(monkeypatch, capsys):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked = []

    def record(model, tokenizer, prompt, *args, **kwargs):
        asked.append(tokenizer.decode(prompt))
        return generate(model, tokenizer, prompt, 2)

    monkeypatch.setattr("fastprune.inspect.generate.generate", record)
    chat(model, tokenizer, system="Be brief.", read=lines("one", "", "two", "/clear", "three"))
    first, second, third = asked
    assert first == "Be brief.\n\n### Instruction:\none\n\n### Response:\n"
    assert second.startswith(first)
    assert second.endswith("### Instruction:\ntwo\n\n### Response:\n")
    assert third == first.replace("one", "three")
    chat(model, tokenizer, read=lines("/exit", "never read"))
    assert len(asked) == 3


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
DEFAULT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nSay it.\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("make", "template", "asked"),
    [
        (lambda: tiny_model("llama"), OWN, "<user>Say it.<assistant>"),
        (lambda: tiny_model("llama"), {"other": "x", "default": OWN}, "<user>Say it.<assistant>"),
        (lambda: tiny_model("llama"), None, DEFAULT),
        (tiny_gpt2, None, DEFAULT),
        (tiny_t5, None, "Say it."),
        (tiny_t5, OWN, "Say it."),
    ],
    ids=["own", "several", "none", "gpt2", "t5", "t5 with one"],
)
def test_the_template_is_that_of_the_models_kind(tmp_path, monkeypatch, make, template, asked):
    """Alike in `chat` and in `generate --chat`; without --chat the bare prompt is continued."""
    prompts = []

    def record(model, tokenizer, prompt, *args, **kwargs):
        prompts.append(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
        return Generation("", "yes", 1, 1.0, 1.0)

    tokenizer, model = copy.deepcopy(tiny_tokenizer()), make()
    tokenizer.chat_template = template
    monkeypatch.setattr("fastprune.inspect.generate.generate", record)
    monkeypatch.setattr("fastprune.inspect.generate._load", lambda config: (model, tokenizer))
    chat(model, tokenizer, read=lines("Say it."))
    for flag in (True, False):
        run_generate(GenerateConfig(model="m", prompt="Say it.", chat=flag))
    assert prompts == [asked, asked, "Say it."]


@pytest.mark.parametrize(
    ("text", "tokens", "template", "chat", "why"),
    [
        ("words", 3, None, False, None),
        ("", 1, OWN, False, "one that ends a text; give --chat, for the model has a chat template"),
        ("", 1, None, False, "a model that was tuned on instructions wants --chat"),
        (" \n", 4, OWN, False, "4 blank or special tokens; give --chat"),
        ("", 1, OWN, True, "ask otherwise, or look at the model with fastprune diagnose"),
    ],
)
def test_an_empty_answer_is_explained(text, tokens, template, chat, why):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    found = nothing_said(Generation("", text, tokens, 1.0, 1.0), tokenizer, chat=chat)
    assert (found is None) if why is None else why in found


def test_chat_prints_the_answer_as_it_comes(capsys):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chat(model, tokenizer, 5, read=lines("hello"))
    asked = Encoder(tokenizer, seq2seq=False).prompt("hello", "chat")
    expected = generate(model, tokenizer, asked, 5).text
    assert expected.strip() in capsys.readouterr().out


def test_a_refused_conversation_is_an_input_error_with_the_reason():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ raise_exception('no one may speak') }}"
    with pytest.raises(InputError, match="no one may speak"):
        chat(tiny_model("llama"), tokenizer, read=lines("hello"))


def test_the_end_of_a_turn_ends_the_generation():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    model = tiny_model("llama", vocab_size=len(tokenizer))
    turn = tokenizer.convert_tokens_to_ids("<|eot|>")
    for _ in range(2):
        stop_at_end_of_turn(model, tokenizer)
        assert model.generation_config.eos_token_id == [0, turn]
    model = tiny_model("llama")  # whose embedding has no row for it
    stop_at_end_of_turn(model, tokenizer)
    assert model.generation_config.eos_token_id == 0


def test_a_prompt_beyond_the_embedding_is_refused_and_padding_is_legal():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model = tiny_model("llama", vocab_size=tokenizer.pad_token_id)
    assert pad_token(model, tokenizer) == tokenizer.eos_token_id
    with pytest.raises(InputError, match=r"the prompt: needs the token '<\|pad\|>' \(id"):
        generate(model, tokenizer, "The <|pad|>", 2)
    assert generate(model, tokenizer, PROMPT, 2).new_tokens == 2


@pytest.mark.parametrize("value", [1e300, 2**63, "x", [2, 2.5]])
def test_settings_that_name_no_token_are_refused(value):
    model = tiny_model("llama", layers=1)
    model.generation_config.eos_token_id = value
    with pytest.raises(InputError, match=r"generation_config.json: broken: eos_token_id must be"):
        generate(model, tiny_tokenizer(), "The river", 2)


@pytest.mark.parametrize("value", [[[1]], 3, [""], {"a": "b"}])
def test_stop_strings_that_are_no_texts_are_refused(value):
    model = tiny_model("llama", layers=1)
    model.generation_config.stop_strings = value
    with pytest.raises(InputError, match=r"generation_config.json: broken: stop_strings must be"):
        generate(model, tiny_tokenizer(), "The river", 2)


@pytest.mark.parametrize("value", [-1, 0, 2.5, "x", True, 10**12])
def test_settings_that_count_in_no_numbers_are_refused(value):
    model = tiny_model("llama", layers=1)
    model.generation_config.num_beams = value
    with pytest.raises(InputError, match=r"generation_config.json: broken: num_beams must be"):
        generate(model, tiny_tokenizer(), "The river", 2)
