"""A pruning run in a few lines of text: for its log, where they can be searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastprune.messages import Message
from fastprune.report import format

WORTH = 0.2
"""Relative fall of the perplexity that a recovery should bring."""


def prune_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Achieved ratio, parameters, query:KV ratio and perplexities of a run, one to a line."""
    ratio, params = metrics["ratio"], metrics["params"]
    requested = ratio["requested"]
    asked = "" if requested is None else f" (requested {requested:.2%})"
    return [
        f"achieved ratio: {ratio['achieved']:.2%} of the block parameters{asked}",
        f"parameters: {params['before']:,} -> {params['after']:,}",
        gqa_line(metrics["layers"]),
        *vocabulary_lines(metrics),
        *filter(None, [budget_line(metrics), divergence_line(metrics)]),
        *(
            f"perplexity on {p['text']} ({p['windows']} windows of {p['seq_len']}): "
            f"{format.perplexity(p['before'])} -> {format.perplexity(p['after'])}"
            for p in metrics["perplexity"]
        ),
        *verdict_lines(metrics),
    ]


def verdict_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The verdict of a run and what to do next; none where nothing was measured."""
    verdict = metrics.get("verdict")
    if not verdict:
        return []
    lines: list[str] = [Message("verdict: {what}", what=verdict["what"])]
    for advice in verdict["advice"]:
        lines.append(Message("next: {advice}", advice=advice["text"]))
        if advice["command"]:
            lines.append(f"  {advice['command']}")
    return lines


def recovery_lines(metrics: Mapping[str, Any]) -> list[str]:
    """How much of what pruning cost a finetuning made good, and why it was no more."""
    found = (metrics.get("origin") or {}).get("perplexity", [])
    known = {(p["text"], p["seq_len"], p["windows"]): p for p in found}
    lines = []
    for p in metrics["perplexity"]:
        figures = known.get((p["text"], p["seq_len"], p["windows"]), {})
        dense, before, after = figures.get("dense"), p["before"], p["after"]
        pruned = figures.get("pruned") or before
        if dense is not None and pruned > dense:
            share = (pruned - after) / (pruned - dense)
            lines.append(
                f"dense {format.perplexity(dense)}, pruned {format.perplexity(pruned)}, recovered "
                f"{format.perplexity(after)}: {format.percent(share) if share > 0 else 'nothing'} "
                "of what pruning cost is made good"
            )
        if after < before:
            lines.append(_gain_line(before, after, dense))
    return lines


def _gain_line(before: float, after: float, dense: float | None) -> str:
    gain = 1 - after / before
    line = f"perplexity is {format.percent(gain)} lower than before"
    if gain >= WORTH:
        return line
    line += f", less than the {format.percent(WORTH)} that a recovery should bring: "
    if dense is not None and dense > (1 - WORTH) * before:
        away = format.percent(max(0.0, 1 - dense / before))
        return line + f"there was no room for more, the dense model was only {away} away"
    return line + (
        "train on more tokens, at a rate of its own (fastprune finetune --find-lr), or with the "
        "dense model as the --teacher"
    )


def gqa_line(layers: Sequence[Mapping[str, Any]]) -> str:
    """Whether every layer kept its query:KV ratio, as it must; layers without attention aside."""
    ratios = {
        (la["query_heads_before"] // la["kv_heads_before"], la["query_heads"] // la["kv_heads"])
        for la in layers
        if la["kv_heads"]
    }
    if changed := sorted(f"{before}:1 -> {now}:1" for before, now in ratios if before != now):
        return f"GQA ratio: changed in some layers ({', '.join(changed)})"
    kept = ", ".join(f"{now}:1" for _, now in sorted(ratios)) or "nothing, no attention is left"
    return f"GQA ratio: all layers kept {kept}"


def vocabulary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What a trimming of the vocabulary took away and cost, a line each; none without one."""
    found = metrics.get("vocabulary")
    if not found:
        return []
    saved = f"{format.count(found['params'])} parameters less"
    lines = [f"vocabulary: {found['before']:,} -> {found['after']:,} tokens, {saved}"]
    for p in metrics["perplexity"]:
        bits = (f"{p[f'bits_per_byte_{side}']:.4f}" for side in ("before", "after"))
        lines.append(
            f"bits per byte on {p['text']}: {' -> '.join(bits)}; both perplexities are per token "
            "of the trimmed vocabulary, the dense model's per token of its own is "
            f"{format.perplexity(p['before_own_tokens'])}"
        )
    return lines


def budget_line(metrics: Mapping[str, Any]) -> str | None:
    """What was asked for and what was reached in its own unit; None for a ratio or a given plan."""
    budget = metrics.get("budget")
    if not budget or budget["unit"] == "ratio":
        return None
    asked, reached = (format.budget(budget["unit"], budget[k]) for k in ("requested", "achieved"))
    line = f"budget: {reached} (requested {asked})"
    latency = metrics.get("latency")
    if budget["unit"] == "ms/token" and latency:
        line += f", {format.milliseconds(latency['predicted'])} predicted"
    return line


def divergence_line(metrics: Mapping[str, Any]) -> str | None:
    """What a search foresaw and what came of it, on the calibration text; None without a search."""
    found = metrics.get("divergence")
    if not found:
        return None
    actual = "" if found["actual"] is None else f", {found['actual']:.4f} measured"
    return (
        f"divergence from the dense model: {found['predicted']:.4f} nats a token foreseen{actual}"
    )
