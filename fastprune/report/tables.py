"""Results on the terminal: one function per command, plain tables on stdout."""

from typing import Any

from rich.table import Table
from rich.text import Text

from fastprune.messages import shown
from fastprune.printing import Console
from fastprune.report import format
from fastprune.report.costs import show_costs
from fastprune.report.speed import speed_rows
from fastprune.report.summary import (
    budget_line,
    divergence_line,
    gqa_line,
    recovery_lines,
    vocabulary_lines,
)


def show_prune(result: dict[str, Any]) -> None:
    """Parameters, perplexity and the shape of every layer, before and after."""
    out = Console()
    params = result["params"]
    table = _table("", "before", "after", "change")
    for name, key in (("parameters", ""), ("in the blocks", "block_")):
        before, after = params[f"{key}before"], params[f"{key}after"]
        change = f"−{format.percent(1 - after / before)}"
        table.add_row(name, format.count(before), format.count(after), change)
    for name, key, words in (
        ("weights as saved", "bytes", format.size),
        ("decoding a token", "latency", format.milliseconds),
    ):
        if measured := result.get(key):
            before, after = measured["before"], measured["after"]
            change = "—" if after is None else f"−{format.percent(1 - after / before)}"
            table.add_row(name, words(before), words(after), change)
    for p in result["perplexity"]:
        name = f"perplexity, {p['text']}, {p['windows']} × {p['seq_len']}"
        change = format.factor(p["before"], p["after"])
        row = (format.perplexity(p["before"]), format.perplexity(p["after"]), change)
        table.add_row(Text(name), *row)
    out.print(_layers(result["layers"]), table, sep="\n")
    out.print(Text(gqa_line(result["layers"])), soft_wrap=True)
    lines = [*vocabulary_lines(result), budget_line(result), divergence_line(result)]
    for line in filter(None, lines):
        out.print(Text(line), soft_wrap=True)
    if "costs" in result:
        show_costs(out, result)
    if "out" in result:
        out.print(Text(f"checkpoint  {result['out']}"), soft_wrap=True)
        out.print(Text(f"report      {result['out']}/fastprune/report.html"), soft_wrap=True)
    _verdict(out, result)


def _verdict(out: Console, result: dict[str, Any]) -> None:
    """What a run came to, in red where that is bad news, and what to do next."""
    verdict = result.get("verdict")
    if not verdict:
        return
    style = "bold red" if verdict["bad"] else "bold"
    out.print(Text(shown(verdict["what"]), style=style), soft_wrap=True)
    _advice(out, verdict["advice"])


def _advice(out: Console, advice: list[dict[str, Any]]) -> None:
    for one in advice:
        out.print(Text(f"→ {shown(one['text'])}"), soft_wrap=True)
        if one["command"]:
            out.print(Text(f"  {one['command']}"), soft_wrap=True)


def _layers(layers: list[dict[str, Any]]) -> Table:
    """One row per run of equal layers, with the query:KV ratio that pruning must preserve."""
    table = _table("layers", "query : KV heads", "ratio", "channels")
    shapes = [
        tuple((layer[f"{k}_before"], layer[k]) for k in ("query_heads", "kv_heads", "channels"))
        for layer in layers
    ]
    first = 0
    for i, shape in enumerate(shapes):
        if i + 1 < len(shapes) and shapes[i + 1] == shape:
            continue
        (q0, q), (k0, k), (c0, c) = shape
        name = str(first) if first == i else f"{first}–{i}"
        ratio = f"{q // k} : 1" if k else "—"
        table.add_row(name, f"{q0} : {k0} → {q} : {k}", ratio, f"{c0} → {c}")
        first = i + 1
    return table


def show_eval(result: dict[str, Any]) -> None:
    """Perplexity with the window it was measured at, memory; the tasks and speeds below."""
    table = _table("", "")
    table.add_row("perplexity", format.perplexity(result["perplexity"]))
    table.add_row("bits per byte", f"{result['bits_per_byte']:.4f}")
    table.add_row("windows", f"{result['windows']} × {result['seq_len']} tokens")
    table.add_row("evaluated", f"{result['tokens_per_second']:,.0f} tokens/s")
    table.add_row("time", format.duration(result["seconds"]))
    table.add_row("peak memory", format.size(result["peak_memory_bytes"]))
    out = Console()
    out.print(table)
    if result["tasks"]:
        out.print(_tasks(result["tasks"]))
    if result["speed"]:
        out.print(_speed(result["speed"]))


def _speed(speed: dict[str, dict[str, Any]]) -> Table:
    """One row a workload; how many times as fast as the dense model, where there is one."""
    table = _table("speed", *speed)
    for row in speed_rows(speed):
        table.add_row(*row)
    return table


def _tasks(results: dict[str, dict[str, Any]]) -> Table:
    """One row a metric of every task, with its standard error."""
    table = _table("task", "metric", "value", "± stderr", "items", "examples before each")
    for name, result in results.items():
        counts = (result["items"], result["fewshot"])
        rest = ["—" if count is None else str(count) for count in counts]
        for metric, found in result["metrics"].items():
            error = "—" if found["stderr"] is None else f"{found['stderr']:.4f}"
            table.add_row(Text(name), Text(metric), f"{found['value']:.4f}", error, *rest)
    return table


def show_merge(result: dict[str, Any]) -> None:
    """What was merged, and how far the logits moved in each dtype they were compared in."""
    table = _table("", "")
    table.add_row("parameters", format.count(result["params"]["model"]))
    table.add_row("of the adapter", format.count(result["params"]["adapter"]))
    for agreement in result["agreement"]:
        error = f"{agreement['relative_error']:.1e} (allowed {agreement['tolerance']:g})"
        table.add_row(f"change of the logits, {agreement['dtype']}", error)
        same = format.percent(agreement["same_choice"])
        table.add_row(f"same next token, {agreement['dtype']}", same)
    out = Console()
    out.print(table)
    out.print(Text(f"checkpoint  {result['out']}"), soft_wrap=True)


def show_export(result: dict[str, Any]) -> None:
    """What was written: one line a format, and what there is to know about it."""
    out = Console()
    for name, written in result["written"].items():
        place = f"{result['out']}/{written['file']}" if written["file"] else result["out"]
        line = f"{name}  {place}  {format.size(written['bytes'])}"
        out.print(Text(line), soft_wrap=True)
    for name, written in result["written"].items():
        if (difference := written.get("logits_difference")) is not None:
            words = f"{name}: logits differ by {100 * difference:.2g} % from the model's"
            out.print(Text(words), soft_wrap=True)
        for note in written["notes"]:
            out.print(Text(f"{name}: {note}"), soft_wrap=True)


def show_diagnose(result: dict[str, Any]) -> None:
    """Sizes, what was found, the layers that lost most, the verdict, and what to do next."""
    out = Console()
    table = _table("", "")
    params, values = result["params"], result["values"]
    table.add_row("parameters", format.count(params["total"]))
    table.add_row("in the blocks", format.count(params["block"]))
    table.add_row("dtype", ", ".join(result["dtypes"]))
    for name, key in (("NaN", "nan"), ("Inf", "inf")):
        table.add_row(name, f"{values[key]:,}")
    for name, key in (("zeros", "zeros"), ("beyond 6 sigma", "outliers")):
        table.add_row(name, f"{100 * values[key] / max(1, params['total']):.2g} %")
    out.print(_anatomy(result["layers"]), table, sep="\n")
    if result["dense"] is not None:
        out.print(_losses(result["dense"]))
    marks = {"broken": "✗", "warning": "!", "note": "·"}
    for finding in result["findings"]:
        out.print(Text(f"{marks[finding['severity']]} {shown(finding['what'])}"), soft_wrap=True)
    out.print(Text(shown(result["verdict"])), style="bold")
    _advice(out, result["advice"])


def _anatomy(layers: list[dict[str, Any]]) -> Table:
    """One row per run of layers that look the same."""
    table = _table("layers", "query : KV heads", "ratio", "channels", "dead heads, channels")
    keys = ("query_heads", "kv_heads", "ratio", "channels", "dead_heads", "dead_channels")
    looks = [tuple(str(layer[key]) for key in keys) for layer in layers]
    first = 0
    for i, layer in enumerate(layers):
        if i + 1 < len(layers) and looks[i + 1] == looks[i]:
            continue
        q, k, ratio, channels = ("—" if layer[key] is None else f"{layer[key]}" for key in keys[:4])
        dead = f"{len(layer['dead_heads'])}, {layer['dead_channels']}"
        name = str(first) if first == i else f"{first}–{i}"
        table.add_row(name, f"{q} : {k}", f"{ratio} : 1" if layer["ratio"] else "—", channels, dead)
        first = i + 1
    return table


def _losses(dense: dict[str, Any], shown: int = 5) -> Table:
    """The layers that cost most; all of them are in the JSON."""
    table = _table("layer", "cosine", "own error", "KL when it alone is exchanged")
    for loss in sorted(dense["layers"], key=lambda layer: -layer["kl"])[:shown]:
        row = (f"{loss['cosine']:.4f}", f"{loss['error']:.3f}", f"{loss['kl']:.3g}")
        table.add_row(str(loss["layer"]), *row)
    return table


def show_finetune(result: dict[str, Any]) -> None:
    """One line a stage, and where the checkpoint lies."""
    out = Console()
    table = _table("stage", "lr", "steps", "skipped", "loss", "perplexity before", "after", "")
    for stage in result["stages"]:
        rates = stage["lr"] if isinstance(stage["lr"], list) else [stage["lr"]]
        table.add_row(
            Text(stage["name"]),
            ", ".join(f"{rate:.3g}" for rate in rates),
            str(stage["steps"]),
            str(stage["skipped_steps"]),
            "—" if stage["loss"] is None else f"{stage['loss']:.3f}",
            format.perplexity(stage["perplexity"]["before"]),
            format.perplexity(stage["perplexity"]["after"]),
            "kept" if stage["kept"] else "rolled back",
        )
    out.print(table)
    for p in result["perplexity"]:
        figures = f"{format.perplexity(p['before'])} → {format.perplexity(p['after'])}"
        windows = f"{p['windows']} × {p['seq_len']}"
        out.print(Text(f"perplexity  {p['text']}, {windows}: {figures}"), soft_wrap=True)
    for stage in result["stages"]:
        if stage["bleu"]:
            measured = format.bleu(stage["bleu"]["bleu"])
            out.print(Text(f"{stage['name']}: BLEU-4 {measured}"), soft_wrap=True)
    for line in recovery_lines(result):
        out.print(Text(line), soft_wrap=True)
    if test := result.get("test"):
        loss = "—" if test["loss"] is None else f"{test['loss']:.3f}"
        figures = f"loss {loss}, perplexity {format.perplexity(test['perplexity'])}"
        if "bleu" in test:
            figures += f", BLEU-4 {format.bleu(test['bleu']['bleu'])}"
        out.print(Text(f"test  {test['data']}, {test['items']} samples: {figures}"), soft_wrap=True)
    for sample in result["samples"]:
        if sample["step"] is None:
            out.print(Text(f"{sample['prompt']} → {sample['text']}"), soft_wrap=True)
    if "out" in result:
        out.print(Text(f"checkpoint  {result['out']}"), soft_wrap=True)
        out.print(Text(f"report      {result['out']}/fastprune/report.html"), soft_wrap=True)
    _verdict(out, result)


def show_compare(result: dict[str, Any]) -> None:
    """One line a run, a perplexity column for each text it was measured on."""
    texts = [(m["text"], m["seq_len"], m["windows"]) for m in result["measurements"]]
    headings = [f"{text}, {windows} × {seq_len}" for text, seq_len, windows in texts]
    table = _table("run", "in the blocks", "removed", *headings, "time")
    for run in result["runs"]:
        after = {(p["text"], p["seq_len"], p["windows"]): p["after"] for p in run["perplexity"]}
        table.add_row(
            Text(run["name"]),
            "—" if (block := run["params"]["block_after"]) is None else format.count(block),
            "—" if (share := run["ratio"]["achieved"]) is None else format.percent(share),
            *(format.perplexity(after.get(text)) for text in texts),
            format.duration(run["seconds"]),
        )
    out = Console()
    out.print(table)
    out.print(Text(f"report  {result['out']}"), soft_wrap=True)


def show_info(result: dict[str, Any]) -> None:
    """Versions, kernels and devices, one to a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in result["versions"].items():
        table.add_row(name, Text(value))
    for name, value in result["system"].items():
        if name == "memory_bytes":
            table.add_row("memory", format.size(value))
        else:
            table.add_row(name, Text(str(value)))
    table.add_row("threads", str(result["threads"]))
    for kernels in result["kernels"]:
        words = ["on" if kernels["usable"] else "off", kernels["detail"], kernels["reason"]]
        table.add_row(f"{kernels['name']} kernels", Text("; ".join(filter(None, words))))
    for device in result["devices"]:
        memory = format.size(device["memory_bytes"])
        table.add_row(
            f"cuda:{device['index']}",
            Text(f"{device['name']}, {memory}, compute capability {device['capability']}"),
        )
    Console().print(table)


def _table(*columns: str) -> Table:
    """Names to the left, figures to the right, no frame."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table
