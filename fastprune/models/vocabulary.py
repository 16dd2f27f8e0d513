"""A tokenizer beside the embedding it indexes: ids that have no row, and rows for them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.models.multimodal import enclosing
from fastprune.models.quiet import quiet_libraries

log = logging.getLogger("fastprune")


def embedding_rows(model: nn.Module) -> int:
    """How many token ids `model` has an embedding for: the ids below it are legal."""
    return model.get_input_embeddings().weight.shape[0]


def check_largest(model: nn.Module, tokenizer: Any, largest: int, name: str) -> None:
    """InputError where `largest`, the greatest token id in what is called `name`, is not legal."""
    rows = embedding_rows(model)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"{name}: needs the token {token!r} (id {largest}), and the model's embedding has only "
            f"{rows} rows; use the tokenizer that the model was trained with, or let fastprune "
            "finetune --resize-embeddings make room"
        )


def grow_embeddings(model: nn.Module, tokenizer: Any, seed: int) -> int:
    """Give `model`, in place, an embedding (and a head) for all tokens of `tokenizer`.

    New rows are drawn by `seed` around the mean of the old ones, as transformers does. Returns how
    many there are; 0 where there was room for all. Raises InputError for a part of a multimodal
    model.
    """
    rows, wanted = embedding_rows(model), 1 + max(tokenizer.get_vocab().values())
    if wanted <= rows:
        return 0
    if enclosing(model) is not None:
        raise InputError(
            "--resize-embeddings: the tokens of a multimodal model stand for images too, and its "
            "embedding stays as it is; use the tokenizer that it was trained with"
        )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), quiet_libraries():
        torch.manual_seed(seed)
        model.resize_token_embeddings(wanted)
    log.info("the embedding was grown from %d to %d rows", rows, wanted)
    return wanted - rows
