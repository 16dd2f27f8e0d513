"""Which parts of the texts calibrate and which are tested."""

import pytest
from tiny import tiny_model

from fastprune.prune.config import PruneConfig
from fastprune.prune.texts import run_windows

WORDS = 1000  # of each text


def number_words(text, **_):
    """A tokenizer for texts of numbered words: no two words of the texts below share a token."""
    return {"input_ids": [ord(word[0]) * WORDS + int(word[1:] or 0) for word in text.split()]}


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
def test_a_window_that_is_tested_never_calibrates(files, calib, tested, windows):
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
    test, calibration = run_windows(config, model, number_words, calibrate=True)
    assert test.shape == (windows, 32)
    assert not set(test.flatten().tolist()) & set(calibration.flatten().tolist())
    letters = [chr(int(window[0]) // WORDS) for window in calibration]
    assert letters == list(calib) * (8 // len(calib)), "equal shares, in turn"
