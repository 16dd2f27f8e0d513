"""LoRA adapters on disk: which model they were trained on, and putting them back onto it.

An adapter adds to weights it does not carry; on any other model it computes nonsense, silently. So
an adapter of ours lies beside a fingerprint of its base, and none is put onto a model that its
tensors do not fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError, NumericalError
from fastprune.models.checks import check_values
from fastprune.models.families import decoder_layers, geometry
from fastprune.models.quiet import quiet_libraries
from fastprune.readers import read_json

CONFIG_FILE, BASE_FILE = "adapter_config.json", "fastprune_base.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
SAMPLES = 64
"""Weights of each tensor that enter a fingerprint."""
MAX_RANK = 2**14
"""Columns of a low-rank matrix: more than any has, and few enough for the memory."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""
FOREIGN = (
    (r"\.(lora_\w+|modules_to_save)\.\w+\.weight$", "the adapter's own name is left in them, as in "
     "a state dict that was gathered by hand (from DeepSpeed, say)"),
    (r"^lora_(unet|te\d?)_", "they are of an image model"),
    (r"_orig_mod\.", "they are of a compiled model (torch.compile)"),
    (r"_fsdp_wrapped_module\.|^module\.", "they are of a model wrapped for several processes"),
    (r"\.lora_[ab]$", "they are MLX's"),
    (rf"^(?!{re.escape(PREFIX)})", f"they lack the {PREFIX} before every name"),
)  # fmt: skip
"""Patterns of tensor names that peft does not write, and what they tell."""

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Fingerprint:
    """What tells a base model from others: its sizes, and digests of a sample of its weights."""

    base: str
    """the model as it was named"""
    parameters: int
    layers: list[list[int]]
    """per decoder layer: query heads, KV heads, channels; empty for families without such units"""
    dtype: str
    digests: dict[str, str]
    """of the sample rounded to each dtype, so that a base read at half precision is recognised"""

    @staticmethod
    def of(model: nn.Module, base: str = "") -> Fingerprint:
        """The fingerprint of `model`, or of the base of a PEFT model, whose weights are frozen."""
        digests = {name: hashlib.sha256() for name in DTYPES}
        parameters = dict(sorted(_base_parameters(model)))
        for name, parameter in parameters.items():
            step = max(1, parameter.numel() // SAMPLES)
            sample = parameter.detach().flatten()[::step][:SAMPLES].cpu()
            for dtype, digest in digests.items():
                digest.update(f"{name} {tuple(parameter.shape)}".encode())
                rounded = sample.to(DTYPES[dtype]).contiguous()
                digest.update(rounded.view(torch.uint8).numpy().tobytes())
        dtype = next(iter(parameters.values())).dtype
        return Fingerprint(
            base=base,
            parameters=sum(p.numel() for p in parameters.values()),
            layers=_layer_sizes(model),
            dtype=str(dtype).removeprefix("torch."),
            digests={name: digest.hexdigest() for name, digest in digests.items()},
        )

    def difference(self, model: Fingerprint) -> str | None:
        """How `model` differs from this base, in words; None where it does not."""
        if len(self.layers) != len(model.layers):
            return f"it has {len(model.layers)} layers, the base {len(self.layers)}"
        units = ("query heads", "KV heads", "channels")
        for index, (own, other) in enumerate(zip(self.layers, model.layers)):
            for unit, expected, found in zip(units, own, other):
                if expected != found:
                    return f"layer {index} has {found} {unit}, the base's {expected}"
        if self.parameters != model.parameters:
            return f"it has {model.parameters} parameters, the base {self.parameters}"
        dtype = self.common_dtype(model)
        if dtype is not None and self.digests.get(dtype) != model.digests.get(dtype):
            return "its weights are not the base's"
        return None

    def common_dtype(self, model: Fingerprint) -> str | None:
        """The dtype in which both can be compared; None for bfloat16 against float16."""
        if self.dtype == model.dtype or model.dtype == "float32":
            return self.dtype
        return model.dtype if self.dtype == "float32" else None


def check_adapter(directory: str | Path) -> None:
    """InputError where there is no usable LoRA adapter in `directory`, whatever model it is for."""
    directory = Path(directory).expanduser()
    _check_files(directory)
    read_fingerprint(directory)
    _check_names(directory, _tensors(directory))


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """`model` with the LoRA adapter in `directory` on it, unmerged: a PeftModel for inference.

    The model is changed in place. The adapter's own weights are fp32. Raises InputError when there
    is no usable adapter, when `model` is not the base it was trained on, or when its tensors do not
    fit; an adapter without a fingerprint (made by plain peft) is checked for its tensors' names and
    shapes only, with a warning. Where it was trained on a larger or smaller vocabulary and holds
    the embeddings and the head of it, those of `model` are resized.
    """
    from peft import PeftModel, get_peft_model_state_dict

    directory = Path(directory).expanduser()
    _check_files(directory)
    _check_base(model, directory)
    tensors = _tensors(directory)
    _check_names(directory, tensors)
    carried = _carried(model, tensors)
    _fit_vocabulary(model, directory, {name: len(tensors[name]) for name in carried})
    _check_fit(model, directory, tensors)
    device = next(model.parameters()).device
    try:
        with quiet_libraries():
            adapted = PeftModel.from_pretrained(model, str(directory), torch_device=str(device))
    except Exception as error:  # peft raises whatever a config of another version leads to
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{directory}: the adapter does not load: {reason}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if strays := sorted((expected.keys() ^ tensors.keys()) - carried):
        raise InputError(
            f"{directory}: the adapter does not cover this model ({len(strays)} tensors, first "
            f"{strays[0]}); give the model it was trained on"
        )
    return adapted.eval()


@torch.no_grad()
def fold(adapted: nn.Module) -> nn.Module:
    """The model in which the adapter of the PeftModel `adapted` is part of the weights, unchecked.

    `adapted` is taken apart. Each weight is added to in fp32 and returns to its own dtype before
    the next, so that little more memory is taken than the model has. Tied embeddings that the
    adapter makes differ from the head are no longer tied. Raises NumericalError when a merged
    weight is not finite, InputError for a kind of LoRA that cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = adapted.get_base_model()
    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(end, BaseTunerLayer):  # what is merged into one must not show in the other
            layer = end.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.clone())
    for module in adapted.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        dtype = layer.weight.dtype
        layer.float()
        try:
            module.merge(safe_merge=True)
        except ValueError as error:  # what safe_merge raises
            raise NumericalError(
                "the merged weights hold NaN or Inf: the adapter or the model is broken; nothing "
                "was written"
            ) from error
        except (NotImplementedError, TypeError, AttributeError) as error:  # peft's own, by method
            raise InputError(f"the adapter cannot be merged: {error}; use it unmerged") from error
        layer.to(dtype)
    with quiet_libraries():
        model = adapted.unload()
    if model.config.tie_word_embeddings:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if torch.equal(embeddings.weight, head.weight):
            model.tie_weights()
        else:
            model.config.tie_word_embeddings = False
    return model


def read_fingerprint(directory: Path) -> Fingerprint | None:
    """The fingerprint beside the adapter in `directory`, or None. Raises InputError if broken."""
    file = directory / BASE_FILE
    if not file.is_file():
        return None
    try:
        found = Fingerprint(**read_json(file))
        sizes = [size for layer in found.layers for size in layer]
        texts = (found.base, found.dtype, *found.digests, *found.digests.values())
        if not all(type(n) is int for n in (found.parameters, *sizes)):
            raise ValueError("sizes are whole numbers")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("names and digests are texts")
        return found
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: broken; copy the adapter again") from error


def write_fingerprint(directory: Path, fingerprint: Fingerprint) -> None:
    """Put `fingerprint` beside the adapter in `directory`."""
    text = json.dumps(asdict(fingerprint), indent=1, ensure_ascii=False)
    (directory / BASE_FILE).write_text(text + "\n", encoding="utf-8")


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model, or of a PEFT model's base, by the names they have without PEFT."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, parameter in inner.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _layer_sizes(model: nn.Module) -> list[list[int]]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        sizes = [geometry(layer) for layer in decoder_layers(inner)]
    except AttributeError:  # another family: its tensors' shapes are in the digests
        return []
    return [[g.query_heads, g.kv_heads, g.channels, *filter(None, [g.experts])] for g in sizes]


def _check_files(directory: Path) -> None:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"--adapter {directory}: not an adapter folder (it has no {CONFIG_FILE})")
    try:
        settings = read_json(file)
        kind = settings["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: broken adapter config; copy the adapter again") from error
    if kind != "LORA":
        raise InputError(f"--adapter {directory}: a {kind} adapter; only LoRA can be used")
    rank = settings.get("r")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise InputError(f"{file}: the rank r must be a whole number from 1 to {MAX_RANK}")
    import peft

    known = {field.name for field in fields(peft.LoraConfig)}
    if unknown := sorted(key for key, value in settings.items() if value and key not in known):
        log.warning(
            "%s: settings that peft %s does not know and leaves out (%s): the adapter is of "
            "another version of peft and may compute something else there",
            file,
            peft.__version__,
            ", ".join(unknown),
        )


def _check_base(model: nn.Module, directory: Path) -> None:
    base = read_fingerprint(directory)
    if base is None:
        log.warning(
            "%s: an adapter without a fingerprint of its base: only names and shapes can be "
            "checked, not that the model is the one it was trained on",
            directory,
        )
        return
    found = Fingerprint.of(model)
    if difference := base.difference(found):
        raise InputError(
            f"--adapter {directory} was trained on {base.base or 'another model'}, and MODEL is "
            f"not that: {difference}; give the model it was trained on"
        )
    if base.common_dtype(found) is None:
        log.warning(
            "%s: trained on a %s base and put onto a %s one: only sizes could be compared",
            directory,
            base.dtype,
            found.dtype,
        )


def _tensors(directory: Path) -> dict[str, Tensor]:
    from peft.utils.save_and_load import load_peft_weights

    if not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise InputError(f"--adapter {directory}: no weights ({WEIGHT_FILES[0]}) in this folder")
    try:
        with quiet_libraries():
            tensors = load_peft_weights(str(directory), device="cpu")
    except Exception as error:  # safetensors and pickle raise errors of their own
        raise InputError(
            f"--adapter {directory}: its weights cannot be read ({type(error).__name__}); "
            "copy the adapter again"
        ) from error
    check_values(tensors, f"--adapter {directory}")
    return tensors


def _check_names(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Raise InputError unless `tensors` are named as peft names those of an adapter."""
    if not tensors:
        raise InputError(
            f"--adapter {directory}: its weight file holds no tensors, so the adapter was lost "
            "when it was saved; save it again with save_pretrained of the PeftModel"
        )
    for pattern, what in FOREIGN:
        if name := next(filter(re.compile(pattern).search, tensors), None):
            raise InputError(
                f"--adapter {directory}: its tensors are not named as peft names them ({name}): "
                f"{what}; save it again with save_pretrained of the PeftModel"
            )


def _carried(model: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """The names of those `tensors` that are whole embeddings or heads."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [PREFIX + path for path, module in model.named_modules() if module in ends]
    names = {path + end for path in paths for end in (".weight", ".base_layer.weight")}
    return names & tensors.keys()


def _fit_vocabulary(model: nn.Module, directory: Path, rows: dict[str, int]) -> None:
    """Resize embeddings and head to the `rows` that the adapter carries, by tensor name.

    Raises InputError where it carries one of the two only and `model` needs both.
    """
    now = len(model.get_input_embeddings().weight)
    wanted = set(rows.values()) - {now}
    if not wanted:
        return
    # LoRA beside tied embeddings keeps the matrix that both of them share.
    shared = model.config.tie_word_embeddings and any(".base_layer." in name for name in rows)
    if len(set(rows.values())) > 1 or not (shared or len(rows) == 2):
        raise InputError(
            f"--adapter {directory} was trained on a vocabulary of {wanted.pop()} tokens and does "
            f"not hold both embeddings and head of it; MODEL has {now}: give the resized model"
        )
    (size,) = wanted
    log.warning("%s: its vocabulary of %d tokens replaces the %d of MODEL", directory, size, now)
    model.resize_token_embeddings(size, mean_resizing=False)


def _check_fit(model: nn.Module, directory: Path, tensors: dict[str, Tensor]) -> None:
    """Raise InputError unless each low-rank pair belongs to a linear layer of its size."""
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        path, dot, rest = name.removeprefix(PREFIX).partition(".lora_")
        if not dot or rest not in ("A.weight", "B.weight"):
            continue
        module = modules.get(path)
        if module is None:
            raise InputError(
                f"--adapter {directory} changes {path}, which this model does not have; give the "
                "model it was trained on"
            )
        rows, columns = _features(module)
        own, expected = (tensor.shape[1], columns) if rest[0] == "A" else (tensor.shape[0], rows)
        if own != expected:
            side = "inputs" if rest[0] == "A" else "outputs"
            raise InputError(
                f"--adapter {directory} was made for a {path} of {own} {side}; this model's has "
                f"{expected}: give the model it was trained on"
            )


def _features(module: nn.Module) -> tuple[Any, Any]:
    """Outputs and inputs of a linear layer; of GPT-2's Conv1D too, which keeps them transposed."""
    rows, columns = module.weight.shape[:2]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
