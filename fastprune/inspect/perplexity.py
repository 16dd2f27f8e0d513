"""Perplexity in non-overlapping windows, of any causal language model or layer by layer."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fastprune.bounds import LENGTH, Range, check_ranges
from fastprune.config import CommonConfig, Group, Positional
from fastprune.data.builtin import EVALUATION_TEXT
from fastprune.data.text import (
    Document,
    characters_for,
    eval_windows,
    load_documents,
    opening,
    token_stream,
)
from fastprune.distributed import ALONE, Processes
from fastprune.errors import InputError
from fastprune.inspect.health import unsound
from fastprune.inspect.memory import forget_peak, peak_memory_bytes
from fastprune.inspect.speed import FULL, Speed, measure_speeds
from fastprune.inspect.tasks import TaskOptions, evaluate_tasks
from fastprune.messages import Message
from fastprune.models.checks import layer_parameters
from fastprune.models.forward import batches, chunked_loss, decoder_and_head
from fastprune.models.layers import Layers
from fastprune.models.load import check_source, load_model
from fastprune.models.quantised import quantise
from fastprune.models.seq2seq import halves, is_seq2seq, response_states
from fastprune.models.vocabulary import check_largest
from fastprune.progress import track
from fastprune.sharding import inside

SEQ_LEN = 1024
"""Tokens of an evaluation window where nothing is said and the model has as many positions."""

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and everything that must be said with it."""

    perplexity: float
    tokens: int
    """tokens scored: windows * (seq_len - 1); of an encoder-decoder model the second halves"""
    seq_len: int
    windows: int
    seconds: float
    tokens_per_second: float
    """tokens read (windows * seq_len) per second"""
    peak_memory_bytes: int
    text_bytes: int | None = None
    """bytes of text, in UTF-8, that the scored tokens stand for, where they were counted"""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a scored token stands for, on average."""
        assert self.text_bytes is not None  # counted by `with_bytes`
        return max(self.text_bytes, 1) / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The mean negative log-likelihood of a byte of text, in bits.

        Unlike a perplexity it compares models of different tokens.
        """
        return math.log2(self.perplexity) / self.bytes_per_token

    def per_token_of(self, other: Perplexity) -> Perplexity:
        """The same loss a byte as a perplexity per token of ``other``, which reads other tokens."""
        mean = math.log(self.perplexity) * other.bytes_per_token / self.bytes_per_token
        return replace(
            self,
            perplexity=_exp(mean),
            tokens=other.tokens,
            windows=other.windows,
            text_bytes=other.text_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation(Perplexity):
    """What `eval` measured: a perplexity, and tasks where any were asked for."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """by name, as `evaluate_tasks` gives them"""
    model: str = ""
    text: str = ""
    params: dict[str, int] = field(default_factory=dict)
    """of the model: in `total`, and in its layers (`block`)"""
    speed: dict[str, Speed] = field(default_factory=dict)
    """of the `model` and, where one was named, of the `dense` one, measured in turns"""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them, and the bits per byte."""
        return {**super().to_dict(), "bits_per_byte": self.bits_per_byte}


@dataclass(kw_only=True)
class EvalConfig(TaskOptions, CommonConfig):
    """Measure perplexity, tasks, speed and memory of a model.

    For example:
        fastprune eval small
        fastprune eval small --text mine.txt --tasks arc_easy,piqa
        fastprune eval small --speed --dense MODEL
    """

    model: Positional[str]
    """Hugging Face directory, hub id, .gguf file, .pt of a GPT-2, or smollm2-135m"""
    text: str = EVALUATION_TEXT
    """text to read: a path, hf:NAME[:CONFIG[:SPLIT]], a short name, or builtin:wikitext2, :c4 or
    :pydocs; several, joined by commas, are read one after the other"""
    seq_len: Annotated[int | None, Group.EVALUATION, LENGTH] = None
    """tokens per window, at most the model's maximum positions (default: 1024, or that maximum)"""
    windows: Annotated[int, Group.EVALUATION, Range(1, 10**6)] = 16
    """number of windows, from the start of the text; fewer where the text is shorter"""
    batch_size: Annotated[int | None, Group.EVALUATION, Range(1, 2**16)] = None
    """windows, or requests of a task, per forward pass (default: about 2048 tokens, 8 requests)"""
    speed: bool = False
    """also measure how fast prompts of 128, 512 and 2048 tokens are read, and how fast 1, 8 and 32
    sequences at once are decoded"""
    dense: str | None = None
    """for --speed: measure this model too, the two of them in turns"""
    adapter: Path | None = None
    """folder with a LoRA adapter, evaluated on the model without being merged"""
    quantize: Annotated[Literal[8, 4] | None, Group.FILES] = None
    """hold the weights of the layers in 8 or 4 bits: less memory, somewhat worse answers; needs
    fastprune[quantize]"""
    tokenizer: Annotated[str | None, Group.FILES] = None
    """folder or hub id (gpt2) of the tokenizer to use instead of the model's own, or where a .pt
    has none beside it"""
    allow_pickle: Annotated[bool, Group.FILES] = False
    """read a pickled .bin file; it can run any code it contains"""
    trust_remote_code: Annotated[bool, Group.FILES] = False
    """run the Python code in the model's folder, where transformers has none for its type"""

    def check(self) -> None:
        """InputError when a value is out of range, or what --tasks needs is not installed."""
        check_ranges(self)
        self.check_tasks()
        if self.dense is not None and not self.speed:
            raise InputError("--dense is the model that --speed compares with: give both")


def run_eval(config: EvalConfig) -> Evaluation:
    """Load the model, the text and the tasks that `config` names and measure.

    Raises InputError, and NumericalError when the loss is not a number.
    """
    config.check()
    enough = characters_for(config.windows * (config.seq_len or SEQ_LEN))
    documents = load_documents(config.text, enough)
    if config.dense is not None:
        check_source(config.dense, config.trust_remote_code)
    model, tokenizer = _load(config, config.model, config.adapter, config.tokenizer)
    params = {
        "total": sum(p.numel() for p in model.parameters()),
        "block": layer_parameters(model),
    }
    if config.quantize is not None:
        quantise(model, config.quantize)
    seq_len = window_length(model, "--seq-len", config.seq_len, SEQ_LEN)
    windows = text_windows(tokenizer, documents, seq_len, config.windows)
    check_largest(model, tokenizer, int(windows.max()), config.text)
    speed = _speeds(config, model) if config.speed else {}
    result = evaluate(model, windows, batch_size=config.batch_size)
    sound(result, model, Message("the loss of {model}", model=config.model))
    result = with_bytes(result, tokenizer, windows)
    tasks = {}
    if config.tasks:
        tasks = evaluate_tasks(
            model, tokenizer, config, seed=config.seed, batch_size=config.batch_size
        )
    return Evaluation(
        **asdict(result),
        tasks=tasks,
        model=config.model,
        text=config.text,
        params=params,
        speed=speed,
    )


def _load(
    config: EvalConfig, source: str, adapter: Path | None = None, tokenizer: str | None = None
) -> tuple[nn.Module, Any]:
    return load_model(
        source,
        dtype=config.dtype,
        device=config.device,
        allow_pickle=config.allow_pickle,
        trust_remote_code=config.trust_remote_code,
        adapter=adapter,
        tokenizer=tokenizer,
    )


def _speeds(config: EvalConfig, model: nn.Module) -> dict[str, Speed]:
    """The speed of `model` beside that of the dense one, if any."""
    models = {"model": model.get_base_model() if hasattr(model, "get_base_model") else model}
    if config.dense is not None:
        models = {"dense": _load(config, config.dense)[0], **models}
    found = measure_speeds(models, FULL)
    forget_peak(next(model.parameters()).device)  # that of the evaluation is without the dense one
    return found


def sound(found: Perplexity, model: nn.Module, what: str) -> Perplexity:
    """``found`` of ``model``, or NumericalError, which calls the loss ``what``, if it is NaN."""
    if math.isnan(found.perplexity):
        raise unsound(model, what)
    return found


def with_bytes(found: Perplexity, tokenizer: Any, windows: Tensor) -> Perplexity:
    """``found``, measured on ``windows`` (n, s), with the bytes that its scored tokens stand for.

    They are counted by decoding, so a character that a window cuts counts a few bytes too many.
    """
    unscored = found.seq_len - found.tokens // found.windows
    rows = windows.tolist()
    whole, first = (
        sum(len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode()) for ids in part)
        for part in (rows, [row[:unscored] for row in rows])
    )
    return replace(found, text_bytes=whole - first)


def text_windows(tokenizer: Any, documents: list[Document], seq_len: int, windows: int) -> Tensor:
    """The first `windows` windows (n, seq_len) of `documents`; n is less for a short text."""
    stream = token_stream(tokenizer, documents, limit=max(seq_len, 1) * max(windows, 1))
    return eval_windows(stream, seq_len, windows, opening(tokenizer))


def window_length(model: nn.Module, flag: str, asked: int | None, default: int) -> int:
    """Tokens of a window: as many as were `asked` for, else `default`, or the model's maximum where
    that is less. InputError when `flag` asks for more than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return default if asked is None else asked
    if asked is None:
        if default > limit:
            log.info("%s: %d, the model's maximum, instead of %d", flag, limit, default)
        return min(default, limit)
    if asked > limit:
        raise InputError(
            f"{flag} {asked}: the model has {limit} positions at most (max_position_embeddings)"
        )
    return asked


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int | None = None,
    description: str = "evaluating",
    processes: Processes = ALONE,
) -> Perplexity:
    """Perplexity of `model` on the token ids `windows` (n, s); the first of each is not scored.

    exp of the mean negative log-likelihood over all n * (s - 1) scored tokens, summed in float64.
    The encoder of a T5 reads the first half of a window, and the second half is scored. Not a
    number when the model's output is not finite: the caller decides what that means (`sound`).
    Where several `processes` share the work, each runs its own batches. A model that is sharded all
    must evaluate, each all batches: of that each process is given as `ALONE`.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    start = time.perf_counter()
    try:
        for batch in track(processes.share(batches(windows, batch_size)), description):
            loss, scored = inside(model, partial(_summed_loss, model, batch.to(device)))
            total += loss
            tokens += scored
    finally:
        model.train(training)
    processes.sum_(total)
    return measured(total, windows, start, round(processes.sums([tokens])[0]))


@torch.no_grad()
def evaluate_layers(layers: Layers, windows: Tensor, processes: Processes = ALONE) -> Perplexity:
    """The perplexity that `evaluate` measures, of `layers` wherever their weights are.

    The token ids `windows` are (n, s), and so are the figures the same bit for bit.
    """
    start = time.perf_counter()
    rows = processes.share(batches(windows))
    total = torch.zeros((), dtype=torch.float64, device=layers.device)
    for ids, hidden in zip(rows, layers.final(rows, "evaluating"), strict=True):
        total += chunked_loss(hidden, layers.head, ids)[0]
    processes.sum_(total)
    return measured(total, windows, start)


def _summed_loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the windows `ids` (n, s), and of how many tokens."""
    decoder, head = decoder_and_head(model)
    if is_seq2seq(model):
        hidden, labels = response_states(model, *halves(ids))
    else:
        hidden, labels = decoder(input_ids=ids, use_cache=False).last_hidden_state, ids
    return chunked_loss(hidden, head, labels)


def measured(total: Tensor, windows: Tensor, start: float, tokens: int | None = None) -> Perplexity:
    """The perplexity of `windows` (n, s) whose summed negative log-likelihood is `total`.

    `start` is what time.perf_counter said when the measurement began, `tokens` how many were
    scored (default: all but the first of each window).
    """
    n, seq_len = windows.shape
    tokens = n * (seq_len - 1) if tokens is None else tokens
    mean = total.item() / tokens  # waits for the device, so the clock below is right
    seconds = time.perf_counter() - start
    return Perplexity(
        perplexity=_exp(mean) if math.isfinite(mean) else math.nan,
        tokens=tokens,
        seq_len=seq_len,
        windows=n,
        seconds=seconds,
        tokens_per_second=n * seq_len / seconds,
        peak_memory_bytes=peak_memory_bytes(total.device),
    )


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
