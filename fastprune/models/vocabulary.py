"""A tokenizer beside the embedding it indexes: ids that have no row, and rows for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.checkpoint import settle_tie
from fastprune.models.multimodal import enclosing
from fastprune.models.quiet import quiet_libraries

ID_FIELDS = ("_token_id", "_token_ids", "_token_index")
"""How the fields of a config end that hold a token id or several."""
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
"""Other fields that hold token ids, or sequences of them."""

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


def settings_ids(model: nn.Module) -> set[int]:
    """The token ids that the config and the generation settings of `model` name, and the config of
    the multimodal model around it, if there is one."""
    found: set[int] = set()
    for settings in _settings(model):
        for value in _id_fields(settings).values():
            found |= set(_flat(value))
    return {number for number in found if number >= 0}


@torch.no_grad()
def keep_rows(model: nn.Module, kept: Sequence[int]) -> None:
    """Cut embedding and head of `model`, in place, to the rows `kept`, which become 0, 1, ….

    Ids in its settings, as for `settings_ids`, follow; one whose row goes is no longer named.
    """
    settle_tie(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before, around = len(embedding.weight), enclosing(model)
    rows = torch.tensor(kept, device=embedding.weight.device)
    embedding.weight = _cut(embedding.weight, rows)
    embedding.num_embeddings = len(kept)
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
    else:
        head.weight = _cut(head.weight, rows)
    if head.bias is not None:
        head.bias = _cut(head.bias, rows)
    head.out_features = len(kept)
    new = {old: number for number, old in enumerate(kept)}
    for settings in _settings(model):
        for name, value in _id_fields(settings).items():
            setattr(settings, name, _renumbered(value, new))
    for module in (model if around is None else around.model).modules():
        if vars(module).get("vocab_size") == before:
            module.vocab_size = len(kept)
    model.config.vocab_size = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = model.config.pad_token_id


def take_tokens(model: nn.Module, own: Any, tokenizer: Any) -> bool:
    """Cut `model`, which reads the tokens of `own`, to those of `tokenizer`, in their order.

    So it reads and predicts what a model made of it with fewer tokens does. False, and `model` as
    it was, where it lacks one of them or `tokenizer` leaves ids out.
    """
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return True
    kept = [theirs.get(token, -1) for token in sorted(ours, key=ours.__getitem__)]
    if sorted(ours.values()) != list(range(len(kept))) or min(kept) < 0:
        return False
    if max(kept) >= embedding_rows(model):
        return False
    keep_rows(model, kept)
    log.info("of %d tokens those %d are read that the other model has", len(theirs), len(ours))
    return True


def _cut(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter[rows], requires_grad=parameter.requires_grad)


def _settings(model: nn.Module) -> list[Any]:
    own, around = getattr(model, "generation_config", None), enclosing(model)
    found = [model.config, own, None if around is None else around.model.config]
    return [settings for settings in found if settings is not None]


def _id_fields(settings: Any) -> dict[str, Any]:
    """The fields of `settings` that hold token ids, lists of them, or lists of sequences."""
    return {
        name: value
        for name, value in settings.to_dict().items()
        if value is not None and (name.endswith(ID_FIELDS) or name in ID_LISTS)
    }


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield int(value)


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """`value` with the ids `new`; None for one that is gone, and for a list of which none stays."""
    if isinstance(value, (list, tuple)):
        items = [_renumbered(item, new) for item in value]
        return [item for item in items if item is not None] or None
    return value if value < 0 else new.get(value)
