"""What files and weights must be, before and after a library below makes a model of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastprune.errors import InputError

POINTER = b"version https://git-lfs"
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into a name, wherever they wrap."""
PARALLEL = "module."
"""What DataParallel and DistributedDataParallel put before a name."""
DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.\d+\.")
BUFFERS = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|(?:attn|attention)\.(?:masked_)?bias)$")
"""Constants that older releases of transformers saved beside the weights."""
WHOLE = ("float64", "float32", "float16", "bfloat16", "f64", "f32", "f16", "bf16")
"""Dtypes of weights whose numbers are what they say, by their names in torch and in safetensors."""
WHOLE_BESIDE = ("int64", "bool", "i64")
"""Those of positions and masks that lie beside weights."""
WEIGHT = re.compile(r"(?:weight|bias|_proj)$|(?:^|\.)lora_")
"""Names that only weights have."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What weights are computed in."""
MOST_LAYERS = 100_000
TRUST = "trust_remote_code"

log = logging.getLogger("fastprune")


def layer_parameters(model: Any) -> int:
    """Parameters inside the layers of `model`, of whatever family."""
    return sum(p.numel() for name, p in model.named_parameters() if DECODER_LAYER.search(name))


def unwrapped(name: str) -> str:
    """The name of a weight without what wrappers of the model put into it, in whatever order."""
    for wrapper in INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(PARALLEL):
        name = name.removeprefix(PARALLEL)
    return name


def without_wrappers(weights: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`weights` by their unwrapped names. InputError, naming `path`, where two become one."""
    result = {unwrapped(name): value for name, value in weights.items()}
    if len(result) != len(weights):
        raise InputError(
            f"{path}: holds some weights both with and without the prefix of torch.compile or "
            "DDP; save the state of the unwrapped model"
        )
    return result


def inside(folder: Path, name: Any, source: Path) -> Path:
    """The file `name` of `folder`, as the file `source` in it says.

    Raises InputError where the name leads out of the folder. What lies there may be a link.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"{source}: names the file {name}, which is outside of its folder; copy that file "
            "there and name it without a path"
        )
    return folder / path


def check_pointer(file: Path) -> None:
    """Raise InputError where `file` is what Git LFS leaves in the place of a large file."""
    if not file.is_file():
        return
    with file.open("rb") as data:
        if data.read(len(POINTER)) == POINTER:
            raise InputError(
                f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )


def check_layer_count(settings: Mapping[str, Any]) -> None:
    """ValueError for a config's `settings` with more layers than any model, which the library
    would begin to list."""
    inner = settings.get("text_config")
    for part in (settings, inner if isinstance(inner, Mapping) else {}):
        count = part.get("num_hidden_layers")
        if isinstance(count, (int, float)) and count > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {count:.3g}")


def check_whole_numbers(value: Any) -> None:
    """ValueError where a whole number anywhere in the JSON `value` takes more than 64 bits."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} is too large a number")
    parts = value.values() if isinstance(value, Mapping) else value
    for part in parts if isinstance(value, (Mapping, list)) else ():
        check_whole_numbers(part)


def check_config_dtype(config: Any, name: str) -> None:
    """InputError, naming `name`, for a config whose weights are of no dtype that is worked in."""
    if config.dtype is not None and config.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(
            f"{name}: its dtype is {str(config.dtype).removeprefix('torch.')}, not one of {known}; "
            "save the model in one of these"
        )


def quantisation(config: Any) -> Mapping[str, Any] | None:
    """The settings by which the weights of the model of `config` are quantised; None if not."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    return settings if isinstance(settings, Mapping) else vars(settings)


def quantisation_method(settings: Mapping[str, Any]) -> str:
    """The method by its name in transformers, from a config's `settings`."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method) or "an unknown method")


def check_unquantised(config: Any, name: str) -> None:
    """InputError, naming `name`, for a model whose weights are stored quantised."""
    if settings := quantisation(config):
        raise InputError(
            f"{name}: quantised with {quantisation_method(settings)}; give its whole folder, or "
            "the unquantised model"
        )


def check_dtype(name: str, dtype: str, path: Path | str) -> None:
    """InputError where the weight `name` in `path` has a `dtype` that needs a scale beside it, or
    that no weight has.

    `dtype` is a name of safetensors or of torch. Constants that older models keep beside their
    weights are not looked at.
    """
    if BUFFERS.search(name) or dtype.lower() in WHOLE:
        return
    if WEIGHT.search(name) or dtype.lower() not in WHOLE_BESIDE:
        raise unscaled(name, dtype, path)


def check_values(weights: Mapping[str, Any], path: Path | str) -> None:
    """`check_dtype` for all tensors among `weights`, which were read from `path`."""
    for name, value in weights.items():
        if hasattr(value, "dtype"):
            check_dtype(name, str(value.dtype).removeprefix("torch."), path)


def unscaled(name: str, dtype: str, path: Path | str) -> InputError:
    """The InputError for the weight `name` in `path`, which is stored as `dtype`."""
    return InputError(
        f"{path}: {name} is stored as {dtype}, and what such numbers stand for is not said: its "
        "config names no quantization_config, or no scale lies beside it; give the unquantised "
        "model, or its whole quantised folder"
    )


def complaint(found: Mapping[str, Any]) -> str | None:
    """What is wrong with weights of which `found` is transformers' loading info; None if nothing.

    Weights outside the decoder layers that are not used are warned of elsewhere.
    """
    if missing := sorted(found["missing_keys"]):
        return f"{len(missing)} weights are missing, first {missing[0]}"
    if mismatched := sorted(found["mismatched_keys"]):
        name, here, expected = mismatched[0]
        return misfit(name, here, expected)
    if unused := [name for name in unexpected(found) if DECODER_LAYER.search(name)]:
        return (
            f"{len(unused)} weights of its layers are not used, first {unused[0]}: the config "
            "describes a model without them, which computes something else; correct config.json"
        )
    return None


def misfit(name: str, here: Iterable[int], expected: Iterable[int]) -> str:
    """That the weight `name` has the shape `here` in a file and `expected` by the config."""
    return f"{name} has the shape {tuple(here)}, the config says {tuple(expected)}"


def unexpected(found: Mapping[str, Any]) -> list[str]:
    """The weights that were not used, without constants of older releases."""
    return sorted(name for name in found["unexpected_keys"] if not BUFFERS.search(name))


def check_complete(found: Mapping[str, Any], path: Path | str) -> None:
    """InputError, naming `path`, unless transformers' loading info `found` says all went well.

    Weights outside the decoder layers that are not used are only warned of.
    """
    if problem := complaint(found):
        raise InputError(f"{path}: {problem}")
    if unused := unexpected(found):
        log.warning("%s: %d weights are not used, first %s", path, len(unused), unused[0])


def reason(error: BaseException) -> str:
    """What `error` says in one line: of a config that fails a check, the check's own sentence."""
    from huggingface_hub.errors import StrictDataclassError

    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def refusal(path: Path, what: str, error: BaseException) -> InputError:
    """The InputError for `error`, raised by a library while it read `what` from `path`."""
    if TRUST in str(error):
        return InputError(
            f"{path}: loads only by running the Python code that comes with it; where you trust "
            "its source, pass --trust-remote-code to a command that has this flag"
        )
    return InputError(f"{path}: {what}: {reason(error)}")
