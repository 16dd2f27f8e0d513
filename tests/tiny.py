"""Random models of a few thousand weights, and a tokenizer, made without a network.

They have what the real ones have and bugs hide in: grouped-query attention, a head size that is not
hidden size over heads, biases (Qwen2), per-head norms (Qwen3), tied or separate embeddings.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.cohere import CohereConfig
from transformers.models.cohere2 import Cohere2Config
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.olmoe import OlmoeConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.smollm3 import SmolLM3Config
from transformers.models.stablelm import StableLmConfig
from transformers.models.starcoder2 import Starcoder2Config

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
FAMILIES = tuple(CONFIGS)
OTHERS = {
    "cohere": CohereConfig,
    "cohere2": Cohere2Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "granite": GraniteConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "smollm3": SmolLM3Config,
    "stablelm": StableLmConfig,
    "starcoder2": Starcoder2Config,
}
WINDOWED = {"sliding_window": 16}
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3} | WINDOWED,
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0} | WINDOWED,
    "gemma3_text": {"query_pre_attn_scalar": 16} | WINDOWED,
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.6,
    },
    "mistral": {"sliding_window": None},
    "stablelm": {"hidden_size": 128, "use_qkv_bias": True},
}
"""Settings of one family: those by which it differs, at values that show; where it takes no size of
heads, a hidden size that they fill."""
EVERY_FAMILY = (*FAMILIES, *OTHERS)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "stablelm-parallel": {"use_parallel_residual": True, "use_qkv_bias": False},
}
"""Models whose layers have other parts than most of their family."""
EVERY_KIND = (*EVERY_FAMILY, *VARIANTS)
MIXTURES = {
    "mixtral": MixtralConfig,
    "olmoe": OlmoeConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
"""Families whose layers have six experts of 32 channels in place of their MLP, two for each token;
one layer of a Qwen has an MLP."""
VOCABULARY = 300

TEXT = """The river that runs past the old mill turns its wheel in spring and freezes in winter.
Children skate on it while the miller counts his sacks, and nobody remembers who built the dam.
A model that is made smaller must still say the same things, only faster and with fewer weights.
"""


def tiny_config(family: str, *, tied: bool = True, layers: int = 4, **config: Any):
    """A config of `family`, or of a variant: 8 query heads over 4 KV heads of size 16.

    On a hidden size of 64, or of 128 for StableLM, whose heads fill it.
    """
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # ten times the usual spread: logits far from uniform make a wrong weight show
        "initializer_range": 0.2,
    }
    variant, family = VARIANTS.get(family, {}), family.partition("-")[0]
    if family in (*OTHERS, *MIXTURES):
        settings["pad_token_id"] = 0
    if family in MIXTURES:
        settings |= {"num_experts_per_tok": 2, "num_local_experts": 6, "num_experts": 6}
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    if family in ("qwen2_moe", "qwen3_moe"):
        settings |= {"intermediate_size": 96, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
        settings |= {"shared_expert_intermediate_size": 48, "norm_topk_prob": family > "qwen3"}
    settings |= OWN.get(family, {}) | variant | config
    return (CONFIGS | OTHERS | MIXTURES)[family](**settings)


def tiny_model(
    family: str, *, tied: bool = True, layers: int = 4, seed: int = 0, **config: Any
) -> torch.nn.Module:
    """A random fp32 model of `family` in eval mode; the same `seed` gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = tiny_config(family, tied=tied, layers=layers, **config)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # biases and norms start at zeros and ones, where a lost row would not be noticed
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.eval()


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def tiny_checkpoint(path: Path, family: str = "llama", **options: Any) -> Path:
    """Save a tiny model and the tokenizer into the folder `path`; options as of `tiny_model`."""
    tiny_model(family, **options).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def token_ids(n: int = 2, s: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids (n, s)."""
    return torch.randint(VOCABULARY, (n, s), generator=torch.Generator().manual_seed(seed))


def tiny_gpt2(*, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A random fp32 GPT-2 in eval mode: 2 layers, 4 heads of size 16, 128 positions."""
    settings = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 64, "n_layer": 2}
    settings |= {"n_head": 4, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    return _random(GPT2LMHeadModel, GPT2Config(**(settings | config)), seed)


def tiny_t5(*, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A random fp32 T5 in eval mode: 2 + 2 layers, 4 heads of size 16, gated."""
    settings = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}
    settings |= {"num_heads": 4, "feed_forward_proj": "gated-gelu", "pad_token_id": 0}
    settings |= {"eos_token_id": 0, "decoder_start_token_id": 0}
    return _random(T5ForConditionalGeneration, T5Config(**(settings | config)), seed)


def _random(model_class: type, config: Any, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def saved(path: Path, model: torch.nn.Module) -> Path:
    """Save `model` and the tokenizer into the folder `path`."""
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def compute_activations_twice(model: nn.Module) -> None:
    """Turn activation checkpointing on, by the name it has in this release of transformers."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()
