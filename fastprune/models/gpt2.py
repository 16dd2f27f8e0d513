"""GPT-2 weights as training scripts write them, as transformers' GPT-2.

Scripts in the manner of nanoGPT keep a projection as a linear layer (out, in) where transformers
has a Conv1D (in, out), leave the prefixes of whatever wrapped the model in the names, may have no
biases, and round the vocabulary up to a multiple of 64. What they compute is the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.checks import check_complete, unwrapped
from fastprune.models.quiet import quiet_libraries

OWNERS = ("model.", "transformer.")
"""What the model itself puts before a name."""
PROJECTION = re.compile(r"h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASK = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)")
LAYER = re.compile(r"h\.(\d{1,9})\.")
FIRST = "h.0.attn.c_attn.weight"
HEAD_SIZE = 64
"""Of every GPT-2 that was published; the weights alone do not tell."""

log = logging.getLogger("fastprune")


def bare(name: str) -> str:
    """`name` without the prefixes of wrappers and of the model itself."""
    name = unwrapped(name)
    while prefix := next((p for p in OWNERS if name.startswith(p)), None):
        name = unwrapped(name.removeprefix(prefix))
    return name


def is_gpt2(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` holds the weights of a GPT-2, whatever wrapped it."""
    return {FIRST, "wte.weight", "wpe.weight"} <= set(map(bare, state))


def is_linear(state: Mapping[str, Tensor]) -> bool:
    """Whether the GPT-2 in `state` keeps its projections (out, in), as linear layers do."""
    weight = next(value for name, value in state.items() if bare(name) == FIRST)
    return weight.shape[0] > weight.shape[1]


def learned_positions(model: nn.Module) -> int | None:
    """How many positions `model` has learnt, beyond which it fails; None where there is no end."""
    return model.config.n_positions if model.config.model_type == "gpt2" else None


def build_gpt2(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], tokenizer: Any, name: str
) -> nn.Module:
    """The GPT-2 that `state` holds, in its own dtype.

    `settings` are the script's (`n_head`, `dropout`) or transformers' (`activation_function`);
    sizes come from the weights. `name` stands in errors. Raises InputError when weights are missing
    or `tokenizer` has more tokens than the model.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    weights = {bare(key): value for key, value in state.items()}
    weights = {key: value for key, value in weights.items() if not MASK.fullmatch(key)}
    config = GPT2Config(**_settings(weights, settings, tokenizer, name))
    weights = _transposed(weights, config.n_embd, name)
    head = weights.pop("lm_head.weight", None)
    config.tie_word_embeddings = head is None or torch.equal(head, weights["wte.weight"])
    if config.tie_word_embeddings:
        head = weights["wte.weight"]
    weights = {f"transformer.{key}": value for key, value in weights.items()}
    weights["lm_head.weight"] = head
    with torch.device("meta"), quiet_libraries():
        expected = GPT2LMHeadModel(config).state_dict()
    no_bias = [key for key in expected if key.endswith(".bias") and key not in weights]
    weights |= {key: torch.zeros(expected[key].shape, dtype=head.dtype) for key in no_bias}
    missing, unused = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    both = expected.keys() & weights.keys()
    if wrong := sorted(k for k in both if expected[k].shape != weights[k].shape):
        found = tuple(weights[wrong[0]].shape)
        raise InputError(
            f"{name}: {wrong[0]} has the shape {found}, which fits no GPT-2; put the config.json "
            "of its model beside it"
        )
    check_complete(
        {"missing_keys": missing, "unexpected_keys": unused, "mismatched_keys": ()}, name
    )
    with quiet_libraries():
        model = GPT2LMHeadModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=head.dtype
        )
    if rounded_up := list(range(len(tokenizer), config.vocab_size)):
        model.generation_config.suppress_tokens = rounded_up
    return model


def _settings(
    weights: Mapping[str, Tensor], given: Mapping[str, Any], tokenizer: Any, name: str
) -> dict[str, Any]:
    """The fields of the GPT-2 config: sizes off the weights, the rest as given."""
    vocabulary, width = weights["wte.weight"].shape
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"{name}: the tokenizer beside it has {len(tokenizer)} tokens, the model only "
            f"{vocabulary}; put the tokenizer it was trained with there"
        )
    heads = given.get("n_head") or given.get("num_attention_heads")
    if heads is None:
        heads = width // HEAD_SIZE
        log.warning("%s: does not say its number of heads; %d of size 64 taken", name, heads)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise InputError(
            f"{name}: {width} dimensions do not make {heads} heads; "
            'put a config.json beside it that says {"n_head": ...}'
        )
    dropout = given.get("dropout", 0.0)
    fields = {
        "activation_function": given.get("activation_function", "gelu_new"),
        "layer_norm_epsilon": given.get("layer_norm_epsilon", 1e-5),
    }
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        fields[field] = given.get(field, dropout)
    layers = [int(match[1]) for key in weights if (match := LAYER.match(key))]
    inner = weights.get("h.0.mlp.c_fc.weight")
    return fields | {
        "vocab_size": vocabulary,
        "n_positions": weights["wpe.weight"].shape[0],
        "n_embd": width,
        "n_layer": 1 + max(layers),
        "n_head": heads,
        "n_inner": None if inner is None else inner.numel() // width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _transposed(weights: Mapping[str, Tensor], width: int, name: str) -> dict[str, Tensor]:
    """`weights` with every projection (in, out); the one into q, k, v tells how the file has it."""
    rows, columns = weights[FIRST].shape
    if (rows, columns) == (width, 3 * width):
        return dict(weights)
    if (rows, columns) != (3 * width, width):
        raise InputError(
            f"{name}: {FIRST} has the shape {(rows, columns)}, which fits no GPT-2; put the "
            "config.json of its model beside it"
        )
    return {
        key: value.t().contiguous() if PROJECTION.fullmatch(key) else value
        for key, value in weights.items()
    }
