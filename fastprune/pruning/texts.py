"""The windows of a pruning run: what it is measured on, and what it is calibrated on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastprune.data.records import SELF, source_names
from fastprune.data.text import characters_for, load_sources, opening, sample_mix, token_stream
from fastprune.data.written import written_windows
from fastprune.distributed import ALONE, Processes
from fastprune.inspect.perplexity import SEQ_LEN, text_windows, window_length
from fastprune.models.vocabulary import check_largest
from fastprune.pruning.config import PruneConfig

CALIB_SEQ_LEN = 256
"""Tokens of a calibration window where nothing is said and the model has as many positions."""


def with_lengths(config: PruneConfig, model: nn.Module) -> PruneConfig:
    """``config`` with the lengths of its windows decided. InputError for one that is too long."""
    calib, test = config.calib_seq_len, config.eval_seq_len
    return replace(
        config,
        calib_seq_len=window_length(model, "--calib-seq-len", calib, CALIB_SEQ_LEN),
        eval_seq_len=window_length(model, "--eval-seq-len", test, SEQ_LEN),
    )


def run_windows(
    config: PruneConfig,
    model: nn.Module,
    tokenizer: Any,
    *,
    calibrate: bool,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor | None]:
    """Evaluation windows from the text's start, calibration windows from what is not tested.

    What the model writes itself is written by the first of ``processes`` for all.
    """
    assert config.eval_seq_len  # decided
    wanted = (config.calib_samples or 0) * (config.calib_seq_len or 0)
    enough = characters_for(wanted + config.eval_windows * config.eval_seq_len)
    sources = load_sources(config.eval, enough)
    documents = [text for texts in sources.values() for text in texts]
    test = text_windows(tokenizer, documents, config.eval_seq_len, config.eval_windows)
    check_largest(model, tokenizer, int(test.max()), config.eval)
    if not calibrate:
        return test, None
    assert config.calib_seq_len and config.calib_samples  # decided
    start = opening(tokenizer)
    tested = {}
    left = test[:, len(start) :].numel()
    for name, texts in sources.items():
        tested[name] = len(token_stream(tokenizer, texts, left)) if left else 0
        left -= tested[name]
    streams = {}
    names = source_names(config.calib)
    for first, name in enumerate(names):
        if name == SELF:
            share = len(range(first, config.calib_samples, len(names)))
            write = partial(_written, config, model, tokenizer, share, len(start))
            streams[name] = processes.by_first(write).flatten()
        else:
            texts = sources.get(name) or load_sources(name, enough)[name]
            streams[name] = token_stream(tokenizer, texts)[tested.get(name, 0) :]
    windows = sample_mix(
        streams, config.calib_seq_len, config.calib_samples, config.seed, opening=start
    )
    check_largest(model, tokenizer, int(windows.max()), config.calib)
    return test, windows


def _written(
    config: PruneConfig, model: nn.Module, tokenizer: Any, windows: int, opened: int
) -> Tensor:
    """A stream of so many calibration windows by ``model`` itself, less ``opened`` tokens each."""
    assert config.calib_seq_len  # decided by `prune`
    length = config.calib_seq_len - opened
    return written_windows(model, tokenizer, length, max(1, windows), seed=config.seed)
