"""`fastprune merge`: an adapter written into the weights it was trained beside.

Weights and adapter are added in fp32, whatever the checkpoint's dtype. Then the merged model is
compared with the unmerged one on text: once in fp32, which checks the merge itself, and once with
the merged weights rounded as they will be written, which checks what the user gets. Nothing is
written unless both agree.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fastprune.bounds import Range, check_ranges
from fastprune.config import Group, Positional, TrustingConfig, resolve_device
from fastprune.data.builtin import EVALUATION_TEXT
from fastprune.data.text import load_documents
from fastprune.errors import InputError, NumericalError
from fastprune.inspect.generate import take_wording
from fastprune.inspect.memory import peak_memory_bytes
from fastprune.inspect.perplexity import text_windows
from fastprune.inspect.record import Origin
from fastprune.models.adapter import fold, read_fingerprint
from fastprune.models.checkpoint import check_savable, save_checkpoint
from fastprune.models.checks import layer_parameters
from fastprune.models.families import declared_for
from fastprune.models.load import load_model
from fastprune.models.readback import check_read_back
from fastprune.models.vocabulary import check_largest
from fastprune.output import RECORDS, check_out, staged
from fastprune.precision import convert_weights
from fastprune.report.run import Clock, RunLog, command_line, settings, versions, write_json
from fastprune.space import check_space
from fastprune.workplace import check_unclaimed

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Relative error of the logits, ‖merged − unmerged‖ / ‖unmerged‖, that is allowed.

fp32: the same terms in another order, 10⁻⁷ a product, through the layers. fp16 and bf16: every
merged weight is rounded to 11 or 8 bits, by 10⁻⁴ or 10⁻³ of itself on average, in every product of
every layer; errors of that size add up as their squares do and grow on the way through the model.
"""
SAMPLE_WINDOWS, SAMPLE_LENGTH = 2, 128

log = logging.getLogger("fastprune")


@dataclass(kw_only=True)
class MergeConfig(TrustingConfig):
    """Write a LoRA adapter into its model, and check that logits stay as they were.

    For example:
        fastprune merge small --adapter adapter --out merged
        fastprune merge small --adapter adapter --out merged --strength 0.5
    """

    model: Positional[str]
    """the adapter's base: Hugging Face directory, hub id, .gguf file, or smollm2-135m"""
    adapter: Path
    """folder with the adapter (adapter_config.json, adapter_model.safetensors)"""
    out: Path
    """directory of the merged checkpoint"""
    strength: Annotated[float, Range(0, 1000, closed=(False, True))] = 1.0
    """fraction of the adapter that is added to the weights"""
    overwrite: bool = False
    """replace what an earlier run left in --out"""
    read_back: Annotated[bool, Group.FILES] = True
    """load the result from its files and compare its logits before it counts as written"""


@dataclass(frozen=True)
class Agreement:
    """How far the merged model's logits are from the unmerged model's."""

    dtype: str
    """the weights of the merged model; the unmerged one's, and all products, are fp32"""
    tokens: int
    relative_error: float
    """‖merged − unmerged‖ / ‖unmerged‖ over all logits; of a mixture of experts that of the median
    token, since rounding leads some to other experts"""
    tolerance: float
    largest_error: float
    """of one logit"""
    same_choice: float
    """share of the tokens after which both find the same next token likeliest"""


def run_merge(config: MergeConfig) -> dict[str, Any]:
    """Load, merge, verify and save: the `merge` command; returns what metrics.json holds.

    Raises InputError when the adapter is not this model's or `strength` is out of range, and
    NumericalError when the merged weights are not finite or the logits disagree; `config.out` is
    complete or untouched.
    """
    check_ranges(config)
    words = [] if config.tokenizer is None else [config.tokenizer]
    check_unclaimed(config.out)
    check_out(config.out, config.overwrite, [config.model, config.adapter, *words])
    clock = Clock()
    with staged(config.out, config.overwrite) as directory, RunLog() as run_log:
        with clock("load"):
            adapted, tokenizer = load_model(
                config.model,
                dtype=config.dtype,
                device=config.device,
                allow_pickle=config.allow_pickle,
                trust_remote_code=config.trust_remote_code,
                adapter=config.adapter,
                tokenizer=config.tokenizer,
            )
            check_savable(adapted.get_base_model(), tokenizer)
            scale(adapted, config.strength)
            whole, trained = _sizes(adapted)
            check_space(config.out, whole, "the merged model")
            windows = _sample(adapted, tokenizer)
            take_wording(adapted.get_base_model(), tokenizer, config.adapter.expanduser())
        merged, agreements = merge_adapter(adapted, windows, clock)
        metrics = {
            "model": config.model,
            "adapter": str(config.adapter),
            "base_proven": read_fingerprint(config.adapter.expanduser()) is not None,
            "params": {
                "model": sum(p.numel() for p in merged.parameters()),
                "block": layer_parameters(merged),
                "adapter": trained,
            },
            **_origin(config.model, merged),
            "dtype": agreements[-1].dtype,
            "agreement": [asdict(agreement) for agreement in agreements],
            "peak_memory_bytes": peak_memory_bytes(resolve_device(config.device)),
            "versions": versions(),
            "command": command_line(),
            "settings": settings(config),
        }
        with clock("save"):
            save_checkpoint(merged, tokenizer, directory)
            if config.read_back:
                check_read_back(merged, directory)
        metrics["seconds"] = clock.totals(("load", "merge", "verify", "save"))
        records = directory / RECORDS
        records.mkdir()
        write_json(records / "metrics.json", metrics)
        run_log.save(records / "run.log")
    return {**metrics, "out": str(config.out)}


def _sizes(adapted: nn.Module) -> tuple[int, int]:
    """Bytes of the weights of the PeftModel `adapted` without its adapter, and the adapter's
    parameters."""
    named = list(adapted.named_parameters())
    whole = sum(p.nbytes for n, p in named if ".lora_" not in n)
    return whole, sum(p.numel() for n, p in named if ".lora_" in n)


def _origin(model: str, merged: nn.Module) -> dict[str, Any]:
    """The dense model that `model`, into which an adapter was merged, goes back to, if known."""
    origin = Origin.of(model)
    if origin is None:
        return {}
    total = sum(p.numel() for p in merged.parameters())
    return {"origin": origin.with_params(total).to_dict()}


def scale(adapted: nn.Module, strength: float) -> None:
    """Multiply what the LoRA adapter of the PeftModel `adapted` adds by `strength`, in place.

    Between base and adapted model lie some that do better on other text than the training's
    (WiSE-FT, Wortsman et al., arXiv 2109.01903). Raises InputError where it also holds weights that
    stand in place of the base's.
    """
    from peft.tuners.lora import LoraLayer

    made = adapted.active_peft_config
    whole = {
        "modules_to_save": bool(made.modules_to_save),
        "trainable_token_indices": bool(made.trainable_token_indices),
        f"bias {made.bias}": made.bias != "none",
    }
    if strength != 1 and any(whole.values()):
        raise InputError(
            f"--strength {strength:g} scales low-rank matrices, and this adapter also replaces "
            f"weights ({', '.join(what for what, has in whole.items() if has)}); leave it out"
        )
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(strength)


@torch.no_grad()
def merge_adapter(
    adapted: nn.Module, windows: Tensor, clock: Clock | None = None
) -> tuple[nn.Module, list[Agreement]]:
    """The model in which the adapter of the PeftModel `adapted` is part of the weights.

    `adapted` is taken apart. The result has the base's dtype; `windows` (n, s) are the token ids on
    which its logits are compared with the unmerged ones, and the second value says how they agree,
    in fp32 and in the base's dtype. The weights stand in fp32 meanwhile. Raises NumericalError when
    they do not agree, or the merged weights are not finite.
    """
    clock = clock or Clock()
    dtype = adapted.get_base_model().get_input_embeddings().weight.dtype
    adapted = adapted.eval().float()
    with clock("verify"):
        unmerged = _logits(adapted, windows)
    with clock("merge"):
        merged = fold(adapted).requires_grad_(False)
    agreements = []
    with clock("verify"):
        agreements.append(_agreement(merged, windows, unmerged, torch.float32))
        if dtype != torch.float32:
            for parameter in merged.parameters():
                parameter.copy_(parameter.to(dtype))  # rounded as it will be written
            agreements.append(_agreement(merged, windows, unmerged, dtype))
    convert_weights(merged, dtype)
    return merged, agreements


def _sample(model: nn.Module, tokenizer: Any) -> Tensor:
    """Token windows to compare logits on: running text, as far as the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or SAMPLE_LENGTH
    length = min(SAMPLE_LENGTH, positions)
    windows = text_windows(tokenizer, load_documents(EVALUATION_TEXT), length, SAMPLE_WINDOWS)
    check_largest(model, tokenizer, int(windows.max()), EVALUATION_TEXT)
    return windows


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    ids = windows.to(next(model.parameters()).device)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return model(**inputs, use_cache=False).logits


def _agreement(
    merged: nn.Module, windows: Tensor, unmerged: Tensor, dtype: torch.dtype
) -> Agreement:
    logits = _logits(merged, windows)
    difference = logits - unmerged
    family = declared_for(merged.config)
    if family is None or family.mixture is None:
        error = (difference.norm() / unmerged.norm()).item()
    else:  # rounding may lead a token to another expert, and then it has other logits: the median
        error = (difference.norm(dim=-1) / unmerged.norm(dim=-1)).median().item()
    name = str(dtype).removeprefix("torch.")
    found = Agreement(
        dtype=name,
        tokens=windows.numel(),
        relative_error=error,
        tolerance=TOLERANCES[dtype],
        largest_error=difference.abs().max().item(),
        same_choice=(logits.argmax(-1) == unmerged.argmax(-1)).double().mean().item(),
    )
    log.info("merged in %s: logits differ by %.1e of their size", name, error)
    if not error <= found.tolerance:  # not a number fails too
        raise NumericalError(
            f"merged and unmerged logits differ by {error:.1e} of their size in {name}, more than "
            f"rounding explains ({found.tolerance:g}); nothing was written"
        )
    return found
