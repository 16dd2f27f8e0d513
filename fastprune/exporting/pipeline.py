"""The `export` command: load, merge, check every format, write them all or none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.config import resolve_device
from fastprune.errors import InputError
from fastprune.exporting.config import ExportConfig
from fastprune.exporting.formats import Format, check, size_of
from fastprune.exporting.gguf_types import find_quant
from fastprune.inspect.generate import take_wording
from fastprune.inspect.memory import peak_memory_bytes
from fastprune.inspect.record import Origin
from fastprune.models.adapter import CONFIG_FILE, fold, read_fingerprint
from fastprune.models.checks import layer_parameters
from fastprune.models.load import load_model
from fastprune.output import RECORDS, check_out, check_out_file, staged, staged_file
from fastprune.readers import read_json
from fastprune.report.run import Clock, RunLog, command_line, settings, versions, write_json
from fastprune.space import check_space
from fastprune.workplace import check_unclaimed

KEPT_RECORDS = ("plan.json", "layer_importance.json")
"""Records of MODEL's folder that stay true of its other forms."""
MARK = b"fastprune"
"""What the first bytes of every single file of ours hold."""
MARKED_BYTES = 4096


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Load MODEL, merge its adapter, write every format: the `export` command.

    Returns what metrics.json holds. Raises InputError when MODEL cannot be read or cannot have one
    of the forms, and NumericalError when the merged weights are not finite; `config.out` is
    complete or untouched.
    """
    config.formats()  # unknown names are told before MODEL is read
    source, adapter = _base_and_adapter(config)
    _check_out(config, [source, *([adapter] if adapter else [])])
    clock = Clock()
    with _places(config) as places:
        with clock("load"):
            model, tokenizer = load_model(
                source,
                dtype=config.dtype,
                device=config.device,
                allow_pickle=config.allow_pickle,
                trust_remote_code=config.trust_remote_code,
                adapter=adapter,
                tokenizer=config.tokenizer,
            )
            if adapter is not None:
                take_wording(model.get_base_model(), tokenizer, adapter)
                model = fold(model).requires_grad_(False)
        metrics = _write_all(model, tokenizer, config, source, places, clock)
    return _told(metrics, config)


def export(
    model: nn.Module, tokenizer: Any, config: ExportConfig, source: Path | None = None
) -> dict[str, Any]:
    """Write a model in memory; `config.model` is recorded as its name.

    What a checkpoint's records say of the dense model travels with it; they are looked for in the
    folder `source`, by default in the one that `config.model` names. Raises InputError.
    """
    _check_out(config, [config.model])
    known = str(source or config.model)
    with _places(config) as places:
        metrics = _write_all(model, tokenizer, config, known, places, Clock())
    return _told(metrics, config)


def _told(metrics: dict[str, Any], config: ExportConfig) -> dict[str, Any]:
    """What the command returns: `metrics`, and what lies in --out now."""
    return {**metrics, "out": str(config.out), "bytes": size_of(config.out)}


def _base_and_adapter(config: ExportConfig) -> tuple[str, Path | None]:
    """The model to load, and the adapter to merge into it, if any."""
    if config.adapter is not None:
        return config.model, config.adapter.expanduser()
    folder = Path(config.model).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        return config.model, None
    if (folder / "config.json").is_file():
        return config.model, folder
    known = read_fingerprint(folder)
    try:
        named = read_json(folder / CONFIG_FILE)["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        named = ""
    base = (known.base if known else "") or named
    if not base:
        raise InputError(
            f"{folder}: a LoRA adapter that does not say which model it was trained on; name that "
            f"one as MODEL and give --adapter {folder}"
        )
    return str(base), folder


def _check_out(config: ExportConfig, inputs: list[str | Path]) -> None:
    check_unclaimed(config.out)
    words = [] if config.tokenizer is None else [config.tokenizer]
    formats = list(config.formats().values())
    if len(formats) == 1 and formats[0].suffix:
        check_out_file(config.out, _is_ours, config.overwrite, [*inputs, *words])
    else:
        check_out(config.out, config.overwrite, [*inputs, *words])


def _is_ours(file: Path) -> bool:
    with file.open("rb") as content:
        return MARK in content.read(MARKED_BYTES)


def _write_all(
    model: nn.Module,
    tokenizer: Any,
    config: ExportConfig,
    source: str,
    places: dict[str, Path],
    clock: Clock,
) -> dict[str, Any]:
    formats = config.formats()
    for name in formats:
        check(name, model, config)
    total = sum(p.numel() for p in model.parameters())
    check_space(config.out, _bytes(model, config), "the exported model")
    origin = Origin.of(source)
    metrics: dict[str, Any] = {
        "model": config.model,
        "params": {"model": total, "block": layer_parameters(model)},
        "versions": versions(),
        "command": command_line(),
        "settings": settings(config),
    }
    if origin is not None:
        metrics["origin"] = origin.with_params(total).to_dict()
    with RunLog() as run_log:
        written = {}
        for name, one in formats.items():
            with clock(name):
                found = one.writer.write(model, tokenizer, places[name], config)
            written[name] = {"file": _entry(name, one, formats), **found}
        metrics["written"] = written
        metrics["peak_memory_bytes"] = peak_memory_bytes(resolve_device(config.device))
        metrics["seconds"] = clock.totals()
        folders = [places[n] for n, one in formats.items() if not one.suffix]
        shared = [next(iter(places.values())).parent] if len(formats) > 1 else []
        for folder in {*folders, *shared}:
            records = folder / RECORDS
            records.mkdir()
            _keep_records(Path(source).expanduser(), records)
            write_json(records / "metrics.json", metrics)
            run_log.save(records / "run.log")
    return metrics


def _bytes(model: nn.Module, config: ExportConfig) -> float:
    """About what the weights of `model` take in all forms, without padding."""
    whole = sum(p.nbytes for p in model.parameters())
    total = 0.0
    for name in config.formats():
        if name == "gguf":
            total += sum(p.numel() for p in model.parameters()) * find_quant(config.quant).bits / 8
        else:
            total += whole
    return total


@contextmanager
def _places(config: ExportConfig) -> Iterator[dict[str, Path]]:
    """Where each format is written; all of it comes to its place when the block ends well."""
    formats = config.formats()
    if len(formats) > 1:
        with staged(config.out, config.overwrite) as folder:
            places = {name: folder / _entry(name, one, formats) for name, one in formats.items()}
            for name, one in formats.items():
                if not one.suffix:
                    places[name].mkdir()
            yield places
        return
    ((name, one),) = formats.items()
    if one.suffix:
        with staged_file(config.out, _is_ours, config.overwrite) as file:
            yield {name: file}
    else:
        with staged(config.out, config.overwrite) as folder:
            yield {name: folder}


def _entry(name: str, one: Format, formats: dict[str, Format]) -> str:
    """What the entry of a format is called in --out; empty where --out is that entry itself."""
    if len(formats) == 1:
        return ""
    return one.entry(name)


def _keep_records(source: Path, records: Path) -> None:
    for name in KEPT_RECORDS:
        if (source / RECORDS / name).is_file():
            shutil.copyfile(source / RECORDS / name, records / name)
