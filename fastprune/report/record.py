"""What a command leaves behind about itself: typed, and written as metrics.json by one writer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastprune.report.run import write_json

FILE = "metrics.json"


@dataclass(kw_only=True)
class Record:
    """What the records of all commands have in common."""

    model: str
    """as it was named"""
    seconds: dict[str, float]
    """by stage, and their total"""
    peak_memory_bytes: int
    versions: dict[str, str]
    command: str
    """as one could type it again"""
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; fields that are None were not measured and are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class PruneRecord(Record):
    """What `prune` did."""

    params: dict[str, int]
    """before, after, block_before, block_after"""
    ratio: dict[str, float | None]
    """of the block parameters: requested (None for another kind of budget) and achieved"""
    bytes: dict[str, int]
    """of the weight files, before and after"""
    perplexity: list[dict[str, Any]]
    """text, seq_len, windows, before, after; where the vocabulary was trimmed, before is per token
    of the result too, and before_own_tokens, bits_per_byte_before and bits_per_byte_after follow"""
    layers: list[dict[str, int]]
    processes: int
    divergence: dict[str, float | None] | None = None
    """after a search: predicted and actual, in nats a token"""
    vocabulary: dict[str, int] | None = None
    """where it was trimmed: rows of the embedding before and after, and params that went"""
    latency: dict[str, float | int | None] | None = None
    budget: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None
    """the dense model, sizes and perplexities, as `inspect.record.Origin` has them"""
    verdict: dict[str, Any] | None = None
    """band, what, bad, advice, as `inspect.conclude.Conclusion` has them"""
    dtype: str | None = None
    """of a dry run: that of the weights, then the form of the result, then what a run would cost"""
    layout: dict[str, str] | None = None
    costs: dict[str, Any] | None = None


@dataclass(kw_only=True)
class CompressRecord(Record):
    """What `compress` did: the figures of three models, and what its parts recorded."""

    kept: str
    """which of them lies in DIR: recovered, or pruned where the recovery made it worse"""
    dense: dict[str, Any]
    """params, block, perplexity, tasks, peak_memory_bytes, answers"""
    pruned: dict[str, Any]
    recovered: dict[str, Any]
    """and bytes, speed"""
    prune: dict[str, Any]
    """the record of the pruning"""
    finetune: dict[str, Any]
    """the record of the recovery"""
    vocabulary: dict[str, int] | None = None
    """as in the record of the first pruning; perplexities are per token of the result then, and the
    dense model's per token of its own is perplexity_own_tokens"""
    origin: dict[str, Any] | None = None
    """the dense model, sizes and perplexities, as `inspect.record.Origin` has them"""

    @property
    def small(self) -> dict[str, Any]:
        """The figures of the model that lies in DIR."""
        return self.recovered if self.kept == "recovered" else self.pruned


def write_record(directory: Path, record: Record) -> None:
    """Write `record` into the folder `directory`."""
    write_json(directory / FILE, record.to_dict())
