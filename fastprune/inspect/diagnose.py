"""Is this model sound, what did pruning cost it, and what should be done next?

Weights are scanned in their files, without building the model. A forward pass, a perplexity and a
comparison with the dense model follow where they are wanted.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fastprune.bounds import LENGTH, Range
from fastprune.config import Group, Positional, TrustingConfig
from fastprune.data.builtin import EVALUATION_TEXT
from fastprune.data.text import Document, characters_for, load_documents, opening, token_stream
from fastprune.errors import FastpruneError, InputError, NumericalError
from fastprune.inspect import findings as say
from fastprune.inspect.against import Comparison, check_comparable, compare, kept_layers
from fastprune.inspect.anatomy import Heads, LayerHealth, layer_health, wants_lines
from fastprune.inspect.forward import ForwardTest, try_forward
from fastprune.inspect.health import (
    TensorHealth,
    model_weights,
    scan_weights,
    stored_weights,
    why_unsound,
)
from fastprune.inspect.memory import peak_memory_bytes
from fastprune.inspect.perplexity import (
    SEQ_LEN,
    Perplexity,
    evaluate,
    sound,
    text_windows,
    window_length,
)
from fastprune.inspect.record import Origin, read_metrics
from fastprune.inspect.verdict import (
    Advice,
    Case,
    Finding,
    Judgement,
    advise,
    band_finding,
    judge,
    verdict,
    worse_than_guessing,
)
from fastprune.messages import Message
from fastprune.models.dequantised import open_shards
from fastprune.models.load import STATE_SUFFIXES, check_source, load_model, resolve_source
from fastprune.models.shards import FILE, INDEX, ShardReader
from fastprune.models.vocabulary import check_largest, embedding_rows, take_tokens
from fastprune.readers import read_json
from fastprune.report.run import Clock, command_line, settings, versions

FORWARD_TOKENS = 32
log = logging.getLogger("fastprune")


@dataclass(kw_only=True)
class DiagnoseConfig(TrustingConfig):
    """Look for broken weights and wrong sizes, and for what pruning cost.

    The exit status is 4 when the model is not healthy. For example:
        fastprune diagnose small
        fastprune diagnose small --dense MODEL
        fastprune diagnose small --no-forward
    """

    model: Positional[str]
    """Hugging Face directory, hub id, .gguf file, or smollm2-135m"""
    forward: bool = True
    """run the model once; without it a model in safetensors is never built, whatever its size"""
    text: str | None = None
    """measure the perplexity on this text: a path, hf:NAME[:CONFIG[:SPLIT]], a short name, or
    builtin:wikitext2; several, joined by commas, are read one after the other"""
    dense: str | None = None
    """the model before pruning, to compare with layer by layer; on builtin:wikitext2 where no
    --text is given"""
    seq_len: Annotated[int | None, Group.EVALUATION, LENGTH] = None
    """tokens per window of the text, at most the model's maximum positions (default: 1024, or that
    maximum)"""
    windows: Annotated[int, Group.EVALUATION, Range(1, 10**6)] = 16
    """number of windows, from the start of the text; fewer where the text is shorter"""

    def check(self) -> None:
        """InputError when two settings contradict each other."""
        for flag, value in (("--text", self.text), ("--dense", self.dense)):
            if value is not None and not self.forward:
                raise InputError(f"{flag} runs the model, --no-forward forbids it; drop one")


@dataclass
class Diagnosis:
    """Everything that was seen, and what it means. ``verdict`` is healthy, careful or unhealthy."""

    model: str
    tensors: list[TensorHealth]
    layers: list[LayerHealth]
    heads: Heads
    findings: list[Finding]
    text: str | None = None
    """what the perplexity was measured on"""
    forward: ForwardTest | None = None
    perplexity: Perplexity | None = None
    judgement: Judgement | None = None
    comparison: Comparison | None = None
    advice: list[Advice] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Message:
        return verdict(self.findings)

    @property
    def failure(self) -> FastpruneError | None:
        """The error that the command ends with; None unless the model is unhealthy."""
        broken = [finding.what for finding in self.findings if finding.severity == "broken"]
        if not broken:
            return None
        what = Message("{model} is not healthy: {what}", model=self.model, what=broken[0])
        return NumericalError(what)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; None where there is no finite figure."""
        scans = [t.scan for t in self.tensors if t.scan is not None]
        whole = {kind: sum(getattr(scan, kind) for scan in scans)
                 for kind in ("nan", "inf", "zeros", "outliers")}  # fmt: skip
        measured = self.perplexity
        plain = {
            "model": self.model,
            "verdict": self.verdict,
            "findings": [vars(finding) for finding in self.findings],
            "advice": [vars(advice) for advice in self.advice],
            "params": {
                "total": sum(t.numel for t in self.tensors),
                "block": sum(layer.params for layer in self.layers),
            },
            "dtypes": sorted({t.dtype for t in self.tensors}),
            "values": whole,
            "queries_per_kv": self.heads.ratio,
            "layers": [layer.to_dict() for layer in self.layers],
            "forward": self.forward and self.forward.to_dict(),
            "perplexity": measured
            and {"text": self.text, **measured.to_dict(), **vars(self.judgement)},
            "dense": self.comparison and self.comparison.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }
        return _finite_or_none({**plain, **self.facts})


def run_diagnose(config: DiagnoseConfig) -> Diagnosis:
    """Examine the model that ``config`` names: the `diagnose` command.

    Raises InputError when the model or a text cannot be read. An unhealthy model is a result, whose
    ``failure`` the command line ends with.
    """
    config.check()
    clock = Clock()
    text = config.text or (EVALUATION_TEXT if config.dense else None)
    enough = characters_for(config.windows * (config.seq_len or SEQ_LEN))
    documents = load_documents(text, enough) if text else None
    if config.dense is not None:
        check_source(config.dense)
    model: nn.Module | None = None
    tokenizer: Any = None
    source = Path(config.model).expanduser()
    reader, described = None, {}
    if not (source.is_file() and source.suffix in STATE_SUFFIXES):
        folder = resolve_source(config.model)
        described = _settings(folder)
        reader = _reader(folder, described)
    if reader is None:
        with clock("load"):
            model, tokenizer = _load(config, config.model)
        weights, described = model_weights(model), model.config.to_dict()
    else:
        weights = stored_weights(reader)
    with clock("scan"):
        tensors = scan_weights(weights, wants_lines)
    heads = Heads.of(described)
    layers = layer_health(tensors, heads)
    found = Diagnosis(config.model, tensors, layers, heads, [], text)
    found.findings += [*say.of_weights(tensors), *say.of_layers(layers, heads)]
    origin = Origin.of(config.model)
    if config.forward and model is None:
        with clock("load"):
            try:
                if _fits(found, reader, config):
                    model, tokenizer = _load(config, config.model)
            except InputError as error:
                found.findings.append(
                    Finding("broken", Message("it does not load: {error}", error=str(error)))
                )
    if config.forward and model is not None:
        with clock("forward"):
            ids = _first_tokens(tokenizer, documents)
            check_largest(model, tokenizer, int(ids.max()), str(text or EVALUATION_TEXT))
            found.forward = try_forward(model, ids)
        finite = all(tensor.finite for tensor in found.tensors)
        found.findings += say.of_forward(found.forward, finite)
        if documents is not None and found.forward.sound:
            _measure(found, config, model, tokenizer, documents, origin, clock)
    found.advice = advise(_case(found, config, origin))
    found.facts = {
        "seconds": clock.totals(),
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
        "versions": versions(),
        "command": command_line(),
        "settings": settings(config),
    }
    return found


def _measure(
    found: Diagnosis,
    config: DiagnoseConfig,
    model: nn.Module,
    tokenizer: Any,
    documents: list[Document],
    origin: Origin | None,
    clock: Clock,
) -> None:
    """Perplexity, and the comparison with the dense model; fills in ``found``."""
    seq_len = window_length(model, "--seq-len", config.seq_len, SEQ_LEN)
    windows = text_windows(tokenizer, documents, seq_len, config.windows)
    check_largest(model, tokenizer, int(windows.max()), str(found.text))
    dense = None
    if config.dense is not None:
        with clock("load"):
            dense, own = _load(config, config.dense)
            if embedding_rows(dense) != embedding_rows(model):
                take_tokens(dense, own, tokenizer)
            check_comparable(model, dense)
    with clock("perplexity"):
        measured = found.perplexity = evaluate(model, windows)
        if math.isnan(measured.perplexity):
            found.findings.append(Finding("broken", why_unsound(model, Message("the loss"))))
            return
        known = None
        if dense is not None:
            known = sound(
                evaluate(dense, windows), dense, Message("the loss of {model}", model=config.dense)
            ).perplexity
    removed = origin.removed if origin else 0.0
    if dense is not None and known is not None:
        with clock("compare"):
            found.comparison = compare(
                model,
                dense,
                windows,
                name=str(config.dense),
                perplexities=(measured.perplexity, known),
                kept=kept_layers(Path(config.model).expanduser()),
            )
        removed = found.comparison.removed
        found.findings += say.of_comparison(found.comparison, found.heads)
    elif origin is not None:
        windows_of = (str(found.text), measured.seq_len, measured.windows)
        known = origin.figures(windows_of).dense
    judgement = found.judgement = judge(measured.perplexity, known, removed)
    guessing = worse_than_guessing(measured.perplexity, model.config.vocab_size)
    if judgement.band == "unknown" and guessing:
        found.findings.append(Finding("warning", guessing))
    found.findings.append(band_finding(measured.perplexity, judgement))


def _case(found: Diagnosis, config: DiagnoseConfig, origin: Origin | None) -> Case:
    dense = config.dense or (origin.dense if origin else None)
    removed = origin.removed if origin else None
    if found.comparison is not None:
        removed = found.comparison.removed
    # A judgement may be the only thing that is wrong: the model is whole all the same.
    judged = [] if found.judgement is None else [found.findings[-1]]
    others = [finding for finding in found.findings if finding not in judged]
    return Case(
        model=config.model,
        finite=all(tensor.finite for tensor in found.tensors),
        whole=verdict(others) != "unhealthy",
        overflows=_overflow_dtype(found),
        known=origin.known() if origin else None,
        band=found.judgement.band if found.judgement else None,
        measured=found.judgement is not None,
        dense=dense,
        made_by=read_metrics(Path(config.model).expanduser()).get("command"),
        removed=removed,
        masked=any(layer.dead_heads or layer.dead_channels for layer in found.layers),
        flags=loading_flags(config),
    )


def loading_flags(config: DiagnoseConfig) -> tuple[str, ...]:
    """The flags of ``config`` that decide how the model is loaded, as they were given."""
    flags = []
    if config.tokenizer is not None:
        flags += ["--tokenizer", config.tokenizer]
    if config.dtype != "auto":
        flags += ["--dtype", config.dtype]
    flags += ["--allow-pickle"] if config.allow_pickle else []
    return (*flags, *(["--trust-remote-code"] if config.trust_remote_code else []))


def _overflow_dtype(found: Diagnosis) -> str | None:
    """The dtype that the forward pass left, where all else is as it should be."""
    broken = sum(finding.severity == "broken" for finding in found.findings)
    finite = all(tensor.finite for tensor in found.tensors)
    nan = found.perplexity is not None and math.isnan(found.perplexity.perplexity)
    test = found.forward
    if broken != 1 or not finite or test is None or test.constant or (test.sound and not nan):
        return None
    return test.dtype


def _load(config: DiagnoseConfig, name: str) -> tuple[nn.Module, Any]:
    return load_model(
        name,
        dtype=config.dtype,
        device=config.device,
        allow_pickle=config.allow_pickle,
        trust_remote_code=config.trust_remote_code,
        tokenizer=config.tokenizer,
    )


def _first_tokens(tokenizer: Any, documents: list[Document] | None) -> Tensor:
    """Token ids (1, s) of the text's beginning, for the forward pass."""
    if documents is None:
        documents = load_documents(EVALUATION_TEXT)
    start = opening(tokenizer)
    return torch.cat([start, token_stream(tokenizer, documents, limit=FORWARD_TOKENS)])[None]


def _reader(folder: Path, settings: Mapping[str, Any]) -> ShardReader | None:
    """The safetensors in ``folder``, of the given config; None where its weights are others."""
    stored = any((folder / name).is_file() for name in (FILE, INDEX))
    return open_shards(folder, settings.get("quantization_config")) if stored else None


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise InputError(f"{folder}: not a model folder (it has no config.json); name another")
    described = read_json(file)
    if not isinstance(described, dict):
        raise InputError(f"{file}: broken config (not an object); copy it again")
    return described


def _fits(found: Diagnosis, reader: ShardReader | None, config: DiagnoseConfig) -> bool:
    """Whether the model may be loaded into memory; says so where it is too large."""
    size = sum(entry.stop - entry.start for entry in reader.entries.values()) if reader else 0
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size < available or config.text or config.dense:
        return True
    log.warning("%s is larger than this machine's memory: not run", config.model)
    found.findings.append(
        Finding("note", Message("larger than this machine's memory, so it was not run"))
    )
    return False


def _finite_or_none(value: Any) -> Any:
    """``value`` with None for every float that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
