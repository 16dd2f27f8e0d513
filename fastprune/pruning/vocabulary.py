"""`--vocab`: which tokens stay, and the model and the tokenizer of these alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastprune.data.files import form_of
from fastprune.data.instruct import has_template, prompt_text
from fastprune.data.records import source_files, source_names
from fastprune.data.text import load_documents, token_stream
from fastprune.errors import InputError
from fastprune.models.multimodal import outside
from fastprune.models.trimming import Trimmer
from fastprune.models.vocabulary import embedding_rows, keep_rows, settings_ids
from fastprune.pruning.config import PruneConfig

MULTIPLE = 8
"""The tokens of a text are filled up to a multiple of this, which matrix products want."""
CONVERSATION = [
    {"role": role, "content": content}
    for role, content in (("system", "."), ("user", "?"), ("assistant", "."), ("user", "?"))
]
"""Shows the words that a chat template puts around messages."""

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embedding before and after, and the parameters that went with them."""

    before: int
    after: int
    params: int

    def to_dict(self) -> dict[str, int]:
        """The fields as JSON knows them."""
        return asdict(self)


def check_texts(names: Iterable[str]) -> None:
    """InputError where a text is a file of token ids, which another tokenizer cannot read."""
    for name in names:
        for file in source_files(name):
            if form_of(file) == "tokens":
                raise InputError(
                    f"{file}: holds token ids, which --vocab numbers anew; give the text itself"
                )


def trim(model: nn.Module, tokenizer: Any, config: PruneConfig) -> tuple[Any, Vocabulary]:
    """Cut the vocabulary of ``model``, in place, as ``config`` asks; the tokenizer of the result.

    ``tokenizer`` stays as it is. Raises InputError for a tokenizer that cannot be trimmed and for a
    number of tokens that it cannot have.
    """
    check_texts(source_names(config.eval) + config.calibration_texts())
    before, params = embedding_rows(model), _parameters(model)
    trimmer = Trimmer(tokenizer)
    if trimmer.ids[-1] >= before:
        raise InputError(
            f"the tokenizer has {trimmer.ids[-1] + 1} tokens and the model's embedding {before} "
            "rows; use the tokenizer that the model was trained with"
        )
    kept = _kept(trimmer, settings_ids(model), config)
    trimmed = trimmer.trimmed(kept)
    keep_rows(model, kept)
    found = Vocabulary(before, len(kept), params - _parameters(model))
    log.info("vocabulary: %d of %d tokens kept", found.after, found.before)
    return trimmed, found


def twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares all weights but those of embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(p) for module in ends for p in module.parameters()}
    every = (*model.parameters(), *outside(model))
    return copy.deepcopy(model, {id(p): p for p in every if id(p) not in own})


def _kept(trimmer: Trimmer, named: set[int], config: PruneConfig) -> list[int]:
    """The ids that stay, ascending; ``named`` are those in the model's settings."""
    tokenizer, total = trimmer.tokenizer, len(trimmer.ids)
    named = named.intersection(trimmer.ids)
    needed = trimmer.closed(named.union(_wording(tokenizer)))
    text = config.vocab_text()
    stream = token_stream(tokenizer, load_documents(config.calib if text is None else text))
    counts = torch.bincount(stream, minlength=trimmer.ids[-1] + 1).tolist()
    order = sorted(trimmer.ids, key=lambda token: (-counts[token], token))
    if text is None:
        count = config.vocab_count(total)
        if not len(needed) <= count <= total:
            raise InputError(
                f"--vocab {config.vocab}: {count} of the tokenizer's {total} tokens cannot be "
                f"kept; at least {len(needed)} must stay, so that every text can be encoded"
            )
    else:
        needed |= trimmer.closed(token for token in order if counts[token])
        count = -(-len(needed) // MULTIPLE) * MULTIPLE
    trimmer.fill(needed, order, count)
    return sorted(needed)


def _wording(tokenizer: Any) -> list[int]:
    """The tokens in which the chat template of ``tokenizer``, if any, puts messages."""
    if not has_template(tokenizer):
        return []
    try:
        text = prompt_text(tokenizer, CONVERSATION)
    except InputError as error:
        log.warning("%s; its words may be split after --vocab", error)
        return []
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
