"""LoRA by peft: low-rank matrices beside frozen weights, for uniform and per-layer models.

Loading, and the check that an adapter meets its own base, are in models/adapter.py, where `eval`
and `generate` can reach them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastprune.errors import InputError
from fastprune.models.adapter import (
    CONFIG_FILE,
    WEIGHT_FILES,
    Fingerprint,
    load_adapter,
    write_fingerprint,
)
from fastprune.models.families import PRUNED_PREFIX, SUPPORTED, declaration
from fastprune.models.quiet import quiet_libraries

__all__ = ["TARGETS", "LoraSettings", "attach", "load_adapter", "save_adapter"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every projection of attention and MLP: what is adapted where nothing else is said."""


class LoraSettings(Protocol):
    """The fields of a configuration that `attach` reads."""

    @property
    def lora_r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def lora_target_modules(self) -> tuple[str, ...]: ...


def attach(model: nn.Module, config: LoraSettings) -> nn.Module:
    """Put a new adapter onto `model`, in place: a PeftModel in which only the adapter trains.

    Adapter weights are fp32 whatever the model's are; the adapter starts as no change at all.
    Module names are those of the Llama family (`TARGETS`, short forms such as `q` too), or
    `all-linear`; without names, the projections that the model has. Raises InputError for settings
    out of range and for modules that are not in the model.
    """
    from peft import LoraConfig, get_peft_model

    if config.lora_r < 1:
        raise InputError(f"--lora-r must be at least 1, got {config.lora_r}")
    if config.lora_alpha <= 0:
        raise InputError(f"--lora-alpha must be above 0, got {config.lora_alpha:g}")
    if not 0 <= config.lora_dropout < 1:
        raise InputError(f"--lora-dropout must be from 0 to below 1, got {config.lora_dropout:g}")
    targets = _targets(model, tuple(config.lora_target_modules))
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
    )
    with quiet_libraries():
        adapted = get_peft_model(model, settings)
    if config.lora_dropout == 0:  # dropout scales in the precision of what it reads
        _leave_casts_to_autocast(adapted)
    return adapted


def save_adapter(peft_model: nn.Module, directory: Path, base: str) -> None:
    """Write the adapter of `peft_model` into the folder `directory`, as peft would.

    `base` is the model it was trained on, as a user would name it; beside the adapter lies the
    base's fingerprint, by which `load_adapter` recognises it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    # Not its save_pretrained, which adds a model card without content and may ask the hub.
    settings = copy.copy(peft_model.active_peft_config)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHT_FILES[0], metadata={"format": "pt"})
    settings.save_pretrained(str(directory))
    (directory / WEIGHT_FILES[0]).chmod((directory / CONFIG_FILE).stat().st_mode)
    write_fingerprint(directory, Fingerprint.of(peft_model, base))


def _leave_casts_to_autocast(adapted: nn.Module) -> None:
    """Keep peft from casting what adapters of fp32 weights read.

    Without autocast that is fp32 already, and under autocast, which casts it for each product, peft
    would turn half precision into fp32 first: two passes forward and two backward, of no effect.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and module.weight.dtype == torch.float32:
            module.cast_input_dtype_enabled = False


def _targets(model: nn.Module, names: tuple[str, ...]) -> list[str] | str:
    """The names of the modules to adapt, checked against what `model` has."""
    if names == ("all-linear",):
        return names[0]
    head = model.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    usual = tuple(sorted(linear))
    if model.config.model_type.removeprefix(PRUNED_PREFIX) in SUPPORTED:
        usual = declaration(model).projections
    if not names or names == TARGETS:
        names = usual
    full = [
        f"{name}_proj" if name not in linear and f"{name}_proj" in TARGETS else name
        for name in names
    ]
    found = [name for name in full if name in linear]
    # A model that lost all its attentions lacks q, k, v, o, and the default does not mind.
    if not found or (found != full and tuple(full) != usual):
        missing = ", ".join(name for name in full if name not in linear)
        raise InputError(
            f"--lora-target-modules: this model has no linear module named {missing} that can be "
            f"adapted; it has {', '.join(sorted(linear))}"
        )
    return found
