"""Text that the model writes itself, to calibrate on what it knows instead of on a corpus.

Every window is a document that begins after the model's document separator, sampled at temperature
1 from the whole vocabulary: that is the distribution the model has learnt, in its own languages and
domains. Where a document ends inside a window, the model goes on with another one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.data.instruct import DOCUMENT_ENDS
from fastprune.errors import InputError, NumericalError
from fastprune.models.adapter import Fingerprint
from fastprune.models.attention import cache_keyword
from fastprune.models.foreign import cached_folder
from fastprune.precision import bf16_is_fast, fast_forward
from fastprune.progress import track

LAYOUT = 1  # raise when the way windows are written changes, so that older ones are left alone
BATCH_WINDOWS = 64
SEPARATOR = DOCUMENT_ENDS[0]
"""What many families put between the documents of their pretraining; others have a BOS token."""
VARYING = ("_name_or_path", "transformers_version")
"""Fields of a config that say nothing about what the model computes."""


def written_windows(
    model: nn.Module,
    tokenizer: Any,
    seq_len: int,
    n: int,
    *,
    seed: int = 0,
    cache: Path | None = None,
) -> Tensor:
    """`n` windows (n, seq_len) of token ids, int64, sampled from `model` by `seed`.

    The same model, sizes and seed are read from the folder `cache` (None: the user's cache
    directory) where they have been written before. Raises InputError for a tokenizer without a
    token that a document starts from, NumericalError when the model's output is not finite.
    """
    start = start_token(tokenizer)
    parameter = next(model.parameters())
    about = {name: v for name, v in model.config.to_dict().items() if name not in VARYING}
    fast = parameter.dtype == torch.float32 and bf16_is_fast(parameter.device)
    key = [LAYOUT, Fingerprint.of(model).digests, about, str(parameter.dtype), fast]
    key += [start, seq_len, n, seed]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()

    def write(folder: Path) -> None:
        windows = _sample(model, start, seq_len, n, seed)
        np.save(folder / "windows.npy", windows.numpy().astype(np.int32))

    folder = cached_folder(f"written-{digest[:32]}", write, cache)
    return torch.from_numpy(np.load(folder / "windows.npy").astype(np.int64))


def start_token(tokenizer: Any) -> int:
    """The id of the token that a document starts after. Raises InputError where there is none."""
    if SEPARATOR in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids(SEPARATOR)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        "--calib self: the tokenizer has no token that a document starts from "
        f"({SEPARATOR}, BOS or EOS); calibrate on a text instead"
    )


@torch.no_grad()
def _sample(model: nn.Module, start: int, seq_len: int, n: int, seed: int) -> Tensor:
    """Windows (n, seq_len) on the CPU: what the model says after `start`, token by token."""
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(seed)
    keyword = cache_keyword(model)
    training = model.training
    model.eval()
    batches: list[Tensor] = []
    try:
        with fast_forward(parameter.device, parameter.dtype):
            for last in torch.full((n, 1), start, device=parameter.device).split(BATCH_WINDOWS):
                cache = None
                tokens = []
                done = sum(map(len, batches))
                title = f"writing calibration windows {done + 1} to {done + len(last)} of {n}"
                for _ in track(range(seq_len), title):
                    output = model(input_ids=last, use_cache=True, **{keyword: cache})
                    cache = output[keyword]
                    probabilities = output.logits[:, -1].float().softmax(-1)
                    if not probabilities.isfinite().all():
                        raise NumericalError("the model's output is not finite")
                    last = torch.multinomial(probabilities, 1, generator=generator)
                    tokens.append(last)
                batches.append(torch.cat(tokens, dim=1).cpu())
    finally:
        model.train(training)
    return torch.cat(batches)
