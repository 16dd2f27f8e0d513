"""The decoder of a multimodal model, as the language model that every command works on.

A multimodal model holds a decoder, and around it what turns images or sounds into hidden states.
The decoder with the head is a causal language model: `text_part` makes it one, of the same modules,
so that what is cut or trained in it is cut and trained in the whole. It knows the model around it,
which is written with it, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastprune.errors import InputError
from fastprune.models.quiet import quiet_libraries

PROCESSOR_FILES = ("*processor_config.json", "chat_template.json")
"""What lies beside the weights of a multimodal model and its tokenizer."""


@dataclass(frozen=True)
class Enclosing:
    """The multimodal ``model`` around a decoder, and the ``files`` of its processors by name."""

    model: Any
    files: Mapping[str, bytes] = field(default_factory=dict)


def is_multimodal(config: Any) -> bool:
    """Whether `config` describes a decoder with something around it."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "text_config")


def auto_class(config: Any) -> Any:
    """The class of transformers that builds and loads what `config` describes."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM


def text_part(model: Any, files: Mapping[str, bytes] | None = None) -> Any:
    """The causal language model of the decoder of `model` and its head, modules of `model`.

    A model that is not multimodal is its own. `files` are those of its processors, by name. Raises
    InputError where the decoder and the head are not all that a text goes through.
    """
    if not is_multimodal(model.config):
        return model
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    usual = isinstance(decoder, PreTrainedModel) and isinstance(head, nn.Linear)
    if not usual or not hasattr(decoder, "layers") or decoder.config is model.config:
        raise InputError(
            f"the decoder of a '{model.config.model_type}' is not known: fastprune works on those "
            "that transformers builds as a language model of its own with a linear head"
        )
    config = decoder.config
    with torch.device("meta"), quiet_libraries():
        text = causal_class(type(config), type(decoder))(config)
    text.model = decoder
    text.set_output_embeddings(head)
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    text.generation_config = model.generation_config
    text.enclosing = Enclosing(model, files or {})
    return text.train(model.training)


def enclosing(model: nn.Module) -> Enclosing | None:
    """What lies around `model` when it is the decoder of a multimodal one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "enclosing", None)


def outside(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the multimodal model around `model`, if there is one, that are not its
    own."""
    around = enclosing(model)
    if around is not None:
        own = {id(parameter) for parameter in model.parameters()}
        yield from (p for p in around.model.parameters() if id(p) not in own)


def processor_files(folder: Path) -> dict[str, bytes]:
    """The files of the processors of the multimodal model in `folder`, by name."""
    found = (file for pattern in PROCESSOR_FILES for file in folder.glob(pattern))
    return {file.name: file.read_bytes() for file in found}


class DecoderForCausalLM(GenerationMixin):
    """Mixin before the base class of a decoder that transformers builds in multimodal models only:
    the decoder with a linear head."""

    decoder_class: type[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (n, s or `logits_to_keep`, vocabulary), and the loss where there are `labels`."""
        outputs = self.model(input_ids=input_ids, **inputs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)


def causal_class(config_class: type[Any], decoder_class: type[Any]) -> type[Any]:
    """The causal language model whose config is a `config_class` and whose decoder is a
    `decoder_class`; where transformers has none, one is made and registered with it."""
    base: Any = decoder_class.__base__
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    made = type(
        f"{decoder_class.__name__}ForCausalLM",
        (DecoderForCausalLM, base),
        {
            "config_class": config_class,
            "decoder_class": decoder_class,
            "__module__": decoder_class.__module__,
        },
    )
    AutoModelForCausalLM.register(config_class, made, exist_ok=True)
    return made
