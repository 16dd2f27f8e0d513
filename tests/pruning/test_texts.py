"""Which parts of the texts calibrate and which are tested."""

import pytest
from tiny import TEXT, tiny_model, tiny_tokenizer

from fastprune.data.written import written_windows
from fastprune.errors import InputError
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.texts import run_windows

WORDS = 1000  # of each text


def number_words(text, **_):
    """A tokenizer for texts of numbered words: no two words of the texts below share a token."""
    return {"input_ids": [ord(word[0]) * WORDS + int(word[1:] or 0) for word in text.split()]}


def opened(text, add_special_tokens=True, **_):
    """The same, which puts a token before every text."""
    return {"input_ids": [1] * add_special_tokens + number_words(text)["input_ids"]}


@pytest.fixture
def files(tmp_path):
    names = {}
    for letter in "abc":
        names[letter] = tmp_path / f"{letter}.txt"
        names[letter].write_text(" ".join(f"{letter}{i}" for i in range(WORDS)))
    return names


@pytest.mark.parametrize(
    ("calib", "tested", "windows"),
    [
        ("a", "a", 10),
        ("ab", "a", 10),
        ("ba", "a", 10),
        ("ab", "ab", 10),
        ("b", "ab", 45),  # all of a and the start of b are tested
        ("cb", "abc", 45),
    ],
)
@pytest.mark.parametrize("tokenizer", [number_words, opened])
def test_a_window_that_is_tested_never_calibrates(files, calib, tested, windows, tokenizer):
    config = PruneConfig(
        ratio=0.2,
        calib=",".join(str(files[letter]) for letter in calib),
        calib_seq_len=32,
        calib_samples=8,
        eval=",".join(str(files[letter]) for letter in tested),
        eval_seq_len=32,
        eval_windows=windows,
    )
    model = tiny_model("llama", layers=1, vocab_size=100 * WORDS)
    test, calibration = run_windows(config, model, tokenizer, calibrate=True)
    assert test.shape == (windows, 32)
    assert calibration.shape == (8, 32)
    if tokenizer is opened:
        assert set(test[:, 0].tolist()) == set(calibration[:, 0].tolist()) == {1}
        test, calibration = test[:, 1:], calibration[:, 1:]
    assert not set(test.flatten().tolist()) & set(calibration.flatten().tolist())
    letters = [chr(int(window[0]) // WORDS) for window in calibration]
    assert letters == list(calib) * (8 // len(calib)), "equal shares, in turn"


@pytest.mark.parametrize(("calib", "share"), [("self", 8), ("self,{text}", 4)])
def test_the_model_writes_its_share_of_the_windows(tmp_path, monkeypatch, calib, share):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    config = PruneConfig(
        ratio=0.2,
        calib=calib.format(text=text),
        calib_seq_len=16,
        calib_samples=8,
        eval=str(text),
        eval_seq_len=16,
        eval_windows=4,
        seed=3,
    )
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    _, calibration = run_windows(config, model, tokenizer, calibrate=True)
    assert calibration.shape == (8, 16)
    written = written_windows(model, tokenizer, 16, share, seed=3)
    own = calibration[:: 8 // share]
    assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, written.tolist()))


def test_a_streamed_model_writes_nothing():
    with pytest.raises(InputError, match="--calib self"):
        PruneConfig(ratio=0.2, calib="self", stream=True).check()
