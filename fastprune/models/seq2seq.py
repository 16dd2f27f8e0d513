"""Encoder-decoder models of the T5 family: one stack reads the prompt, one writes the answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from fastprune.errors import InputError

FAMILIES = ("t5", "mt5", "umt5", "longt5")
"""`config.model_type` of the encoder-decoder models that can be measured and trained."""
IGNORED = -100


def is_seq2seq(model: nn.Module) -> bool:
    """Whether `model` has an encoder of its own. Works through wrappers that keep the config."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def check_family(config: Any, name: str) -> None:
    """InputError, naming `name`, for an encoder-decoder model of another kind."""
    if config.is_encoder_decoder and config.model_type not in FAMILIES:
        raise InputError(
            f"{name}: encoder-decoder models of type '{config.model_type}' are not supported; "
            f"those of type {', '.join(FAMILIES)} are"
        )


def response_states(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states (n, s+1, h) and labels (n, s+1) as a causal model would have them.

    `input_ids` (n, p) is what the encoder reads, `labels` (n, s) the response, -100 where nothing
    is scored. A causal model's state at t predicts label t+1, a decoder's predicts label t: one
    unscored place in front of the labels, and one empty state at the end, make them alike. So the
    same loss serves both.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    encoded = inner.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    decoder_ids = inner.prepare_decoder_input_ids_from_labels(labels)
    hidden = inner.decoder(
        input_ids=decoder_ids,
        encoder_hidden_states=encoded,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state
    if getattr(inner.config, "scale_decoder_outputs", False):
        hidden = hidden * inner.config.d_model**-0.5
    return pad(hidden, (0, 0, 0, 1)), pad(labels, (1, 0), value=IGNORED)


def halves(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Token windows (n, s) as prompts and responses: the first half is read, the rest scored."""
    middle = windows.shape[1] // 2
    return windows[:, :middle], windows[:, middle:]


def with_end(ids: list[int], end: int | None) -> list[int]:
    """`ids` ending with the token `end`, as the encoder has seen every prompt in training."""
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
