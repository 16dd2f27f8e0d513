"""BLEU against its definition, and answers in batches against answers one by one."""

import math
from collections import Counter

import pytest
import torch
from tiny import tiny_gpt2, tiny_model, tiny_t5, tiny_tokenizer

from fastprune.errors import InputError
from fastprune.inspect.bleu import answer, bleu, measure_bleu
from fastprune.inspect.generate import generate

REFERENCES = ["the wheel of the old mill turns in spring", "children skate on the frozen river"]
ANSWERS = ["the wheel of the mill turns in early spring", "children skate on the river"]
PROMPTS = ["The river", "Children skate on it while the miller counts", "A model", "Nobody"]


def by_definition(answers, references):
    """Papineni et al. 2002, on lists of words."""
    precisions = []
    for n in range(1, 5):
        matched = total = 0
        for said, expected in zip(answers, references, strict=True):
            grams, wanted = (
                Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
                for words in (said, expected)
            )
            matched += sum((grams & wanted).values())
            total += sum(grams.values())
        precisions.append(matched / total)
    said, expected = (sum(map(len, texts)) for texts in (answers, references))
    penalty = min(1.0, math.exp(1 - expected / said))
    return penalty * math.exp(sum(map(math.log, precisions)) / 4)


def test_english_is_counted_in_words():
    result = bleu(ANSWERS, REFERENCES)
    expected = by_definition([a.split() for a in ANSWERS], [r.split() for r in REFERENCES])
    assert result.bleu == pytest.approx(expected)
    assert (result.tokenizer, result.pairs) == ("13a", 2)
    assert "tok:13a" in result.signature


def test_chinese_is_counted_in_characters():
    references = ["春天河水推动老磨坊的轮子", "孩子们在结冰的河上滑冰"]
    answers = ["春天河水推动磨坊的旧轮子", "孩子们在河上滑冰"]
    result = bleu(answers, references)
    assert result.bleu == pytest.approx(by_definition(answers, references))
    assert result.tokenizer == "zh"


def test_a_few_chinese_names_do_not_make_a_text_chinese():
    assert bleu(ANSWERS, [REFERENCES[0], REFERENCES[1] + " 河"]).tokenizer == "13a"


def test_the_same_is_1_and_nothing_is_0():
    assert bleu(REFERENCES, REFERENCES).bleu == pytest.approx(1)
    assert bleu(["", ""], REFERENCES).bleu == 0
    with pytest.raises(InputError, match="at least one answer"):
        bleu([], [])


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), tiny_gpt2, tiny_t5])
def test_answers_in_batches_are_answers_one_by_one(make):
    model, tokenizer = make(), tiny_tokenizer()
    seq2seq = model.config.is_encoder_decoder
    prompts = [tokenizer(p).input_ids + [0] * seq2seq for p in PROMPTS]
    alone = [generate(model, tokenizer, p, 8).text.strip() for p in PROMPTS]
    assert answer(model, tokenizer, prompts, max_new_tokens=8, batch_size=3) == alone


def test_prompts_too_long_for_learnt_positions_lose_their_beginning():
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    ids = tokenizer("The river runs past the mill. " * 30).input_ids
    assert len(ids) > 128
    (text,) = answer(model, tokenizer, [ids], max_new_tokens=8)
    (same,) = answer(model, tokenizer, [ids[-120:]], max_new_tokens=8)
    assert text == same
    with pytest.raises(InputError, match="128 positions"):
        generate(model, tokenizer, "The river runs past the mill. " * 30, 8)
    assert generate(model, tokenizer, "The river", 500).new_tokens <= 128


def test_examples_are_split_where_the_answer_begins():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.train()
    prompt, response = tokenizer("Who built the dam?").input_ids, tokenizer(" Nobody").input_ids
    ids = torch.tensor([*prompt, *response, 0, *prompt, *response])
    labels = ids.clone()
    labels[: len(prompt)] = -100
    labels[len(prompt) + len(response) + 1 :][: len(prompt)] = -100
    result, answers = measure_bleu(
        model, tokenizer, [{"input_ids": ids, "labels": labels}], max_new_tokens=8
    )
    assert model.training
    (only,) = answers
    assert (only.prompt, only.reference) == ("Who built the dam?", "Nobody")
    assert only.answer == answer(model, tokenizer, [prompt], max_new_tokens=8)[0]
    assert result.pairs == 1
    assert result.to_dict()["bleu"] == result.bleu
    with pytest.raises(InputError, match="this data has none"):
        measure_bleu(model, tokenizer, [{"input_ids": ids, "labels": ids}])


def test_encoder_decoder_examples_are_prompt_and_response():
    model, tokenizer = tiny_t5(), tiny_tokenizer()
    prompt = torch.tensor([*tokenizer("Who built the dam?").input_ids, 0])
    labels = torch.tensor([*tokenizer("Nobody knows").input_ids, 0])
    _, (only,) = measure_bleu(
        model, tokenizer, [{"input_ids": prompt, "labels": labels}], max_new_tokens=8
    )
    assert (only.prompt, only.reference) == ("Who built the dam?", "Nobody knows")
    assert only.answer == generate(model, tokenizer, only.prompt, 8).text.strip()
