"""Calibration text that the model writes itself."""

import copy

import pytest
import torch
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

from fastprune.data import written
from fastprune.data.written import start_token, written_windows
from fastprune.errors import InputError, NumericalError
from fastprune.precision import fast_forward


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_tokens_follow_the_models_own_distribution(model, cache):
    """The first tokens of many windows are spread as the model's first probabilities are."""
    n = 2000
    windows = written_windows(model, tiny_tokenizer(), 2, n, cache=cache)
    assert (windows.shape, windows.dtype) == ((n, 2), torch.int64)
    start = torch.tensor([[start_token(tiny_tokenizer())]])
    with torch.no_grad(), fast_forward(start.device):
        expected = model(input_ids=start).logits[0, -1].float().softmax(-1)
        first = int(expected.argmax())
        context = torch.tensor([[start.item(), first]])
        second = model(input_ids=context).logits[0, -1].float().softmax(-1)
    found = windows[:, 0].bincount(minlength=VOCABULARY) / n
    assert (found - expected).abs().max() < 0.04  # four standard errors of a share of a half
    after = windows[windows[:, 0] == first, 1].bincount(minlength=VOCABULARY)
    error = 4 * (second * (1 - second) / after.sum()).sqrt() + 0.02
    assert (after / after.sum() - second).abs().lt(error).all(), "the cache holds what came before"


def test_a_seed_decides_and_torchs_own_state_stays(model, cache, tmp_path):
    state = torch.get_rng_state()
    windows = written_windows(model, tiny_tokenizer(), 8, 70, cache=cache)
    assert torch.equal(torch.get_rng_state(), state)
    again = written_windows(model, tiny_tokenizer(), 8, 70, cache=tmp_path / "other")
    assert torch.equal(windows, again)
    assert not torch.equal(
        windows, written_windows(model, tiny_tokenizer(), 8, 70, seed=1, cache=cache)
    )
    assert len(windows.unique(dim=0)) == 70, "the second batch is not the first"


def test_windows_are_kept_for_the_same_model_alone(model, cache, monkeypatch):
    windows = written_windows(model, tiny_tokenizer(), 8, 3, cache=cache)
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(0.5)
    others = written_windows(other, tiny_tokenizer(), 8, 3, cache=cache)
    assert not torch.equal(windows, others)
    monkeypatch.setattr(written, "_sample", None)
    assert torch.equal(windows, written_windows(model, tiny_tokenizer(), 8, 3, cache=cache))


def test_the_separator_comes_before_the_start_of_a_chat(model):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    begin = tokenizer.bos_token_id
    assert start_token(tokenizer) in (begin, tokenizer.eos_token_id)
    if written.SEPARATOR not in tokenizer.get_vocab():
        tokenizer.add_tokens([written.SEPARATOR])
    assert tokenizer.decode([start_token(tokenizer)]) == written.SEPARATOR


def test_refusals(model, cache):
    class Bare:
        bos_token_id = eos_token_id = None

        def get_vocab(self):
            return {}

    with pytest.raises(InputError, match="no token that a document starts from"):
        written_windows(model, Bare(), 8, 3, cache=cache)
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        written_windows(broken, tiny_tokenizer(), 8, 3, cache=cache)
    assert not list(cache.iterdir()), "nothing half-written"
