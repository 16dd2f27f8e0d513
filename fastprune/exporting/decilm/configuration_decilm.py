"""The configuration of a DeciLM: a Llama whose layers differ in KV heads and feed-forward width.

This file is copied into every folder of that form, and read there by serving engines with the
transformers that each of them brings: it imports that library only, in any release since 4.45.
"""

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig


class Fields(dict):
    """A JSON object whose entries are attributes too, as engines read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama's settings and `block_configs`, one entry for every layer:

    {"attention": {"no_op": false, "replace_with_linear": false, "n_heads_in_group": 3},
     "ffn": {"no_op": false, "replace_with_linear": false, "ffn_mult": 4.0}}

    `n_heads_in_group` query heads share a KV head. The feed-forward has 2 · ffn_mult · hidden_size
    / 3 channels, rounded up to a multiple of 256. Both are null where `no_op` says that the layer
    has no such part.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list | None = None, **settings: Any) -> None:
        self.block_configs = [
            Fields({part: Fields(fields) for part, fields in block.items()})
            for block in block_configs or []
        ]
        super().__init__(**settings)
