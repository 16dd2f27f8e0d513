"""Config and tokenizer files that engines read which know the keys of transformers 4 only.

transformers 5 keeps the rotary base and its scaling in one `rope_parameters`, calls `torch_dtype`
`dtype`, and names a tokenizer class of its own. An engine that reads the older keys finds none of
them, takes its defaults and computes something else without a word. So both spellings are written;
transformers 5 reads its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
FAST_TOKENIZER = "PreTrainedTokenizerFast"
"""The class of any `tokenizer.json`, by the name that transformers 4 and 5 both know."""
NAMED_BY_VERSION_5 = ("TokenizersBackend",)
APART = ("rope_theta", "partial_rotary_factor")
"""What transformers 4 keeps beside the scaling of the rotary embedding, not in it."""
OF_ITS_LOADING = ("is_local", "local_files_only", "backend")
"""What transformers 5 writes into a tokenizer's file about how it happened to be read."""


def write_generation_config(generation_config: Any, directory: Path) -> None:
    """Write the settings as they are: the library's own writer refuses inconsistent ones.

    A temperature beside `do_sample: false`, for example, as many published models have it.
    """
    (directory / GENERATION).write_text(
        generation_config.to_json_string(use_diff=True), encoding="utf-8"
    )


def add_older_keys(directory: Path) -> None:
    """Write the keys of transformers 4 into the config and tokenizer files of `directory`."""
    _rewrite(directory / CONFIG, older_config_keys)
    _rewrite(directory / TOKENIZER, older_tokenizer_keys)


def older_config_keys(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, the content of a config.json, with the keys that transformers 4 reads as well."""
    found = dict(config)
    if isinstance(text := config.get("text_config"), dict):  # of a multimodal model
        found["text_config"] = older_config_keys(text)
    if "dtype" in config:
        found["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    # Layers that differ, and a rope for each kind of layer (nested), have no older spelling.
    plain_layers = "per_layer_config" not in config
    if plain_layers and isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key not in APART}
        found |= {key: rope[key] for key in APART if key in rope}
        default = scaling.get("rope_type", "default") == "default"
        plain = default and "mrope_section" not in scaling
        found["rope_scaling"] = None if plain else scaling
        original = scaling.get("original_max_position_embeddings")
        if scaling.get("rope_type") == "longrope" and original is not None:
            found["original_max_position_embeddings"] = original
    return found


def older_tokenizer_keys(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, the content of a tokenizer_config.json, as transformers 4 and 5 both read it."""
    found = {key: value for key, value in config.items() if key not in OF_ITS_LOADING}
    if found.get("tokenizer_class") in NAMED_BY_VERSION_5:
        found["tokenizer_class"] = FAST_TOKENIZER
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # a mapping of names in transformers 4
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    return found


def _rewrite(file: Path, change: Any) -> None:
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(change(content), indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")
