"""Tiny random multimodal models, and an image for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

IMAGE, PATCHES = VOCABULARY - 1, 4
"""The token in whose place a patch of the image stands, and how many there are."""
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE - 1,
    "vision_start_token_id": IMAGE - 2,
    "vision_end_token_id": IMAGE - 3,
}
MULTIMODAL = ("gemma3", "llava", "qwen2_vl", "qwen2_5_vl")


def multimodal_config(kind: str) -> Any:
    """A config of `kind`: 4 query heads over 2 KV heads of size 16 in 3 layers, 96 channels."""
    if kind == "gemma3":
        text = TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 16}
        tokens = {"boi_token_index": IMAGE - 1, "eoi_token_index": IMAGE - 2}
        return Gemma3Config(
            text_config=text,
            vision_config=VISION,
            mm_tokens_per_image=PATCHES,
            image_token_index=IMAGE,
            **tokens,
        )
    if kind == "llava":
        return LlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    text = TEXT | {"rope_parameters": ROPE}
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
    vision |= {"intermediate_size": 48, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def tiny_multimodal(kind: str, *, seed: int = 0) -> nn.Module:
    """A random fp32 model of `kind` in eval mode; the same `seed` gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(multimodal_config(kind))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or not parameter.any():  # where nothing would be noticed
                nn.init.normal_(parameter, std=0.2)
            elif "norm" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.float().eval()


def multimodal_checkpoint(path: Path, kind: str) -> Path:
    """Save a tiny model of `kind`, the tokenizer and processor files into the folder `path`."""
    tiny_multimodal(kind).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"size": 28}')
    (path / "processor_config.json").write_text('{"image_token": "<image>"}')
    return path


def with_image(kind: str) -> dict[str, torch.Tensor]:
    """Inputs of a model of `kind`: a text around one random image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY - 10, (1, 16), generator=generator)
    ids[:, 4 : 4 + PATCHES] = IMAGE
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    if kind.startswith("qwen"):
        ids[:, 3] = IMAGE - 2
        pixels = torch.randn(4 * PATCHES, 3 * 2 * 14 * 14, generator=generator)
        return inputs | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    if kind == "gemma3":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).int()}
    return {"input_ids": ids, "pixel_values": pixels}
