"""A tokenizer cut to some of its tokens reads what is left as the whole one does."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_words import sentencepiece_tokenizer
from tiny import TEXT, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastprune.errors import InputError
from fastprune.models.trimming import Trimmer

WORDS = (
    *TEXT.split(),
    "wheels",
    "unfrozen",
    "naïve",
    "你好",
    "🙂",
    "\n\n",
    "  ",
    "<|end|>",
    "1234",
)
END, PAD = "<|end|>", "<|pad|>"


@cache
def byte_level(ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a special token in front and one behind all others, put around texts."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learnt.train_from_iterator([TEXT], trainer)
    described = json.loads(learnt.to_str())
    described["model"]["ignore_merges"] = ignore_merges
    made = Tokenizer.from_str(json.dumps(described))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(PAD, normalized=False, special=True)])
    pad = made.token_to_id(PAD)
    template = processors.TemplateProcessing(f"{PAD} $A", special_tokens=[(PAD, pad)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    made.enable_padding(pad_id=pad, pad_token=PAD)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END,
        pad_token=PAD,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


KINDS = {
    "byte-level": byte_level,
    "ignore-merges": lambda: byte_level(ignore_merges=True),
    "byte-fallback": sentencepiece_tokenizer,
}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def half(kind: str) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, list[int]]:
    """A whole tokenizer, one with the tokens of half a text, and the ids that it keeps."""
    whole = KINDS[kind]()
    trimmer = Trimmer(whole)
    kept = sorted(trimmer.closed(ids_of(whole, TEXT[: len(TEXT) // 2])))
    assert len(trimmer.lasting) < len(kept) < len(trimmer.ids)
    return whole, trimmer.trimmed(kept), kept


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=8))
def test_any_text_is_read_back_and_kept_tokens_map_one_to_one(kind, parts):
    whole, small, kept = half(kind)
    text = " ".join(parts)
    before, after = ids_of(whole, text), ids_of(small, text)
    assert small.decode(after) == whole.decode(before)
    assert max(after, default=0) < len(kept)
    if set(before) <= set(kept):
        assert [kept[number] for number in after] == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_that_was_kept_is_cut_as_before(kind):
    whole, small, kept = half(kind)
    text = TEXT[: len(TEXT) // 2]
    assert small.tokenize(text) == whole.tokenize(text)
    assert [kept[number] for number in ids_of(small, text)] == ids_of(whole, text)
    assert len(small) == len(kept)
    rest = ids_of(whole, TEXT[len(TEXT) // 2 :])
    assert not set(rest) <= set(kept)  # or nothing else would be tried


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_that_stays_can_be_reached(kind):
    whole, small, kept = half(kind)
    trimmer = Trimmer(small)
    merges = {left + right for left, right in trimmer.ranks}
    for token in trimmer.ids:
        text = trimmer.tokens[token]
        assert token in trimmer.lasting or text in merges
        assert trimmer.closure(token) <= set(trimmer.ids)
    assert [whole.convert_tokens_to_ids(trimmer.tokens[token]) for token in trimmer.ids] == kept


@pytest.mark.parametrize("kind", KINDS)
def test_everything_beside_the_vocabulary_stays_and_is_numbered_anew(kind, tmp_path):
    whole, small, kept = half(kind)
    small.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == small.get_vocab()
    assert read.special_tokens_map == whole.special_tokens_map
    assert read.chat_template == whole.chat_template
    assert read.all_special_ids == [kept.index(number) for number in whole.all_special_ids]
    assert set(read.get_added_vocab()) == set(whole.get_added_vocab())
    text = TEXT[:40]
    around = [kept.index(number) for number in whole(text)["input_ids"]]
    assert read(text)["input_ids"] == around
    assert len(around) == len(ids_of(whole, text)) + 1  # the post-processor adds a token
    if padding := json.loads(small.backend_tokenizer.to_str())["padding"]:
        assert padding["pad_id"] == kept.index(whole.pad_token_id)


def test_filling_up_takes_the_first_that_fit_and_stays_closed():
    trimmer = Trimmer(byte_level())
    kept = trimmer.closed([])
    assert kept == trimmer.lasting
    order = trimmer.ids[::-1]
    trimmer.fill(kept, order, len(trimmer.lasting) + 30)
    assert len(kept) == len(trimmer.lasting) + 30
    assert kept == trimmer.closed(kept)
    longest = next(token for token in order if token not in trimmer.lasting)
    assert trimmer.closure(longest) <= kept
    trimmer.fill(kept, order, 10**6)
    assert kept == set(trimmer.ids)


def test_tokenizers_of_other_kinds_are_refused():
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )
    with pytest.raises(InputError, match="of the kind WordLevel"):
        Trimmer(words)
    suffixed = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(InputError, match="prefix or suffix"):
        Trimmer(PreTrainedTokenizerFast(tokenizer_object=suffixed))
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        Trimmer(object())


def test_the_tokenizer_it_was_made_of_is_left_alone():
    whole = tiny_tokenizer()
    before = whole.backend_tokenizer.to_str()
    trimmer = Trimmer(whole)
    trimmer.trimmed(sorted(trimmer.lasting))
    assert whole.backend_tokenizer.to_str() == before
