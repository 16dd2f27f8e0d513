"""The settings of the `prune` command: flags, YAML keys and Python API at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastprune.bounds import LENGTH, POSITIVE, SHARE, Range, check_ranges
from fastprune.config import Group, LoadingConfig, Positional
from fastprune.data.builtin import EVALUATION_TEXT, TRAINING_TEXT
from fastprune.data.records import SELF, source_names
from fastprune.errors import InputError

ALL = "all"
"""As `--layers`: every layer."""
KEEP = "keep:"
"""As `--vocab`: before a text whose tokens stay."""
Importance = Literal[
    "taylor-first",
    "taylor-second",
    "taylor-mix",
    "taylor-vector",
    "magnitude-l1",
    "magnitude-l2",
    "activation",
    "activation-maw",
    "routed-output",
    "obs",
    "random",
]
Allocation = Literal["auto", "uniform", "inverse", "proportional", "global", "search"]


@dataclass(kw_only=True)
class PruneConfig(LoadingConfig):
    """Remove KV groups, MLP channels or sublayers of a model, and measure the perplexity.

    For example:
        fastprune prune smollm2-135m --out small --ratio 0.2
        fastprune prune MODEL --out small --target-bytes 1.5GiB --effort thorough
        fastprune prune MODEL --ratio 0.3 --dry-run
    """

    model: Positional[str] = ""
    """Hugging Face directory, hub id, .gguf file, or smollm2-135m"""
    out: Path | None = None
    """directory of the pruned checkpoint"""
    overwrite: bool = False
    """replace what an earlier run left in --out"""
    ratio: Annotated[float | None, Range(0, 1, closed=(True, False))] = None
    """fraction of the block parameters to remove"""
    ratio_of: Annotated[Literal["block", "structures"], Group.SIZE] = "block"
    """what --ratio is a fraction of: all block parameters, or those of the --structures in the
    --layers, for example to remove a fifth of the attention"""
    target_params: Annotated[int | None, Group.SIZE, Range(1, 10**15)] = None
    """total parameters of the result, instead of --ratio"""
    target_bytes: Annotated[str | None, Group.SIZE] = None
    """largest size of the result's weight files, instead of --ratio: for example 200MB or 1.5GiB"""
    target_latency: Annotated[float | None, Group.SIZE, POSITIVE] = None
    """most milliseconds a token when the result decodes at batch 1 on this machine, instead of
    --ratio"""
    latency_context: Annotated[int, Group.SIZE, Range(1, 2**24)] = 128
    """tokens before the one whose decoding is timed for --target-latency"""
    vocab: Annotated[str | None, Group.SIZE] = None
    """trim the vocabulary, with a budget or alone: keep:TEXT keeps the tokens that occur in TEXT; a
    number such as 20000 or a share such as 40% keeps that many tokens, the most frequent of --calib
    first. Tokens that every text needs always stay"""
    iterations: Annotated[int, Group.SIZE, Range(1, 1000)] = 1
    """reach the budget in this many equal steps, and score again after each"""
    effort: Literal["fast", "balanced", "thorough"] = "balanced"
    """time against quality: sets what you do not set of structures, allocation, layers, limits,
    calibration and alignment, by the ratio and the model"""
    structures: Annotated[
        tuple[Literal["attention", "experts", "mlp", "sublayer"], ...], Group.SELECTION
    ] = ()
    """what may be removed: KV groups (attention), experts, channels (mlp: of MLPs, and of experts
    where these stay), whole attentions and MLPs (sublayer) (default: by --effort: channels as long
    as they suffice, and experts of a mixture of experts)"""
    importance: Annotated[Importance, Group.SELECTION] = "activation-maw"
    """criterion that ranks the units of a layer; routed-output ranks experts by what they add to
    the tokens routed to them"""
    allocation: Annotated[Allocation, Group.SELECTION] = "auto"
    """how the ratio is spread over the layers (auto: by --effort)"""
    exchange_rounds: Annotated[int | None, Group.SELECTION, Range(0, 10_000)] = None
    """rounds after the search in which layers exchange units as long as the divergence of the whole
    model falls; 0 for none (default: by --effort)"""
    layer_importance: Annotated[str, Group.SELECTION] = "removal"
    """sensitivity for inverse and proportional: removal, activation (how much a layer changes its
    input), or a layer_importance.json"""
    alpha: Annotated[float | None, Group.SELECTION] = None
    """exponent of the sensitivity; for global, how much of the difference between layers counts:
    from 0 (none: all layers alike) to 1 (all of it) (default: 1, or by --effort)"""
    min_layer_ratio: Annotated[float, Group.SELECTION, SHARE] = 0.0
    """smallest share of a layer's KV groups and channels to remove, by parameters"""
    max_layer_ratio: Annotated[float | None, Group.SELECTION, SHARE] = None
    """largest share of a layer's KV groups and channels to remove unit by unit, by parameters
    (default: by --effort, at most 0.9)"""
    layers: Annotated[str | None, Group.SELECTION] = None
    """prune only layers A to B-1, written A:B, counted from 0; all for every layer (default: by
    --effort)"""
    compensate: Annotated[Literal["none", "least-squares"], Group.SELECTION] = "least-squares"
    """refit the kept weights so that they make up for the removed ones"""
    layout: Annotated[Literal["per-layer", "uniform", "deci"], Group.SIZE] = "per-layer"
    """per-layer: layers may differ in size; uniform: every layer has the same size, so that any
    engine loads the result; deci: for engines that read DeciLM (nemotron-nas): all heads stay, and
    channels or whole sublayers are removed"""
    align: Annotated[int | None, Group.SIZE, Range(1, 2**20)] = None
    """keep channels in multiples of this number (default: 32 where the model's own widths are
    multiples of it and large, else 1; with --layout deci 256)"""
    calib: str = TRAINING_TEXT
    """calibration text, or self for text that the model writes before it is pruned; several, joined
    by commas, each give an equal share of the windows"""
    calib_samples: Annotated[int | None, Group.CALIBRATION, Range(1, 10**6)] = None
    """calibration windows (default: by --effort, 128 or 512)"""
    calib_seq_len: Annotated[int | None, Group.CALIBRATION, LENGTH] = None
    """tokens of a calibration window, at most the model's maximum positions (default: 256, or that
    maximum)"""
    sensitivity_samples: Annotated[int, Group.CALIBRATION, Range(1, 10**6)] = 16
    """calibration windows used for layer sensitivity"""
    search_samples: Annotated[int, Group.CALIBRATION, Range(2, 10**6)] = 128
    """calibration windows that the search measures and refits with; scores and the final refit use
    all windows"""
    eval: str = EVALUATION_TEXT
    """evaluation text; several, joined by commas, are read one after the other"""
    eval_seq_len: Annotated[int | None, Group.EVALUATION, LENGTH] = None
    """tokens of an evaluation window, at most the model's maximum positions (default: 1024, or that
    maximum)"""
    eval_windows: Annotated[int, Group.EVALUATION, Range(1, 10**6)] = 16
    """evaluation windows, from the start of the text"""
    gate_ppl_ratio: Annotated[float | None, Group.EVALUATION, POSITIVE] = None
    """exit 3 without writing when perplexity grows by more than this factor"""
    keep_worse: Annotated[bool, Group.EVALUATION] = False
    """write the result even if its perplexity is more than 100 times the dense one"""
    plan: Annotated[Path | None, Group.PLAN] = None
    """apply this plan instead of making one"""
    dry_run: Annotated[bool, Group.PLAN] = False
    """make the plan, say what the run would cost, and stop; MODEL may be a folder with nothing but
    a config.json"""
    ranks: Annotated[int, Group.PLAN, Range(1, 2**16)] = 1
    """processes (torchrun) for which --dry-run computes costs"""
    read_back: Annotated[bool, Group.FILES] = True
    """load the result from its files and compare its logits before it counts as written"""
    stream: Annotated[bool, Group.MACHINE] = False
    """for a model larger than memory: keep its weights on disk, one layer at a time in memory"""
    family: Annotated[str | None, Group.FILES] = None
    """for a model type that fastprune does not know: the family whose decoder layers are built in
    the same way, for example llama; the result remembers it"""
    format: Annotated[tuple[str, ...], Group.FILES] = ()
    """write these forms of the result too, as fastprune export does, into OUT/exported:
    hf-uniform, nemotron-nas, gguf"""
    quant: Annotated[str, Group.FILES] = "f16"
    """for gguf: the type of the weight matrices, for example f32, f16, bf16, q8_0, q5_1, q4_0"""
    pad: Annotated[bool, Group.FILES] = False
    """fill widths that a form cannot have with exact zeros, instead of refusing them"""

    def check(self) -> None:
        """InputError when a value is out of range or two contradict each other."""
        check_ranges(self)
        self._check_budget()
        self._check_vocab()
        low, high = (0, 1) if self.allocation == "global" else (-10, 10)
        if self.alpha is not None and not low <= self.alpha <= high:
            raise InputError(
                f"--alpha must lie between {low} and {high} with --allocation {self.allocation}, "
                f"not {self.alpha}"
            )
        if self.gate_ppl_ratio is not None and self.keep_worse:
            raise InputError("--gate-ppl-ratio forbids what --keep-worse allows; give one of them")
        self._check_stream()
        if self.iterations > 1 and self.plan is not None:
            raise InputError("--plan is applied as it is; leave --iterations out")
        self._check_layout()

    def inputs(self) -> list[str | Path]:
        """What the command reads, as it was named; --out must lie apart from it."""
        texts = [*source_names(self.calib), *source_names(self.eval)]
        texts += source_names(self.vocab_text() or "") if self.vocab else []
        files: list[str | Path] = [p for p in (self.plan, self.tokenizer) if p is not None]
        if self.layer_importance not in ("removal", "activation"):
            files.append(self.layer_importance)
        return [self.model, *texts, *files]

    def _check_budget(self) -> None:
        """InputError unless one budget is given, and in its range."""
        budgets = [
            *(self.ratio, self.target_params, self.target_bytes, self.target_latency),
            self.plan,
        ]
        if self.only_trims:
            return
        given = sum(budget is not None for budget in budgets)
        if given != 1:
            raise InputError(
                "give exactly one of --ratio, --target-params, --target-bytes, --target-latency "
                "and --plan" + ("" if given else ", for example --ratio 0.2, or --vocab alone")
            )
        if self.ratio == 0:
            raise InputError("--ratio 0 removes nothing; leave it out beside --vocab")
        if self.ratio_of == "structures" and (self.ratio is None or not self.structures):
            raise InputError("--ratio-of structures needs both --ratio and --structures")

    def _check_vocab(self) -> None:
        """InputError for a --vocab that names neither a text nor a number."""
        if self.vocab is None:
            return
        text, count = self.vocab_text(), re.fullmatch(r"(\d{1,18}(?:\.\d*)?)(%?)", self.vocab)
        if text is None and (count is None or (not count[2] and "." in count[1])):
            raise InputError(
                f"--vocab {self.vocab}: give keep:TEXT, a number of tokens, or a share as 40%"
            )
        if text is not None and not text.strip():
            raise InputError(f"--vocab {self.vocab}: name a text, for example keep:{TRAINING_TEXT}")
        if text is None and SELF in source_names(self.calib):
            raise InputError(
                f"--vocab {self.vocab} counts the tokens of --calib, which is {SELF} here; name a "
                "text, or give --vocab keep:TEXT"
            )

    @property
    def only_trims(self) -> bool:
        """Whether the vocabulary is all that shall be smaller."""
        budgets = (self.target_params, self.target_bytes, self.target_latency, self.plan)
        return self.vocab is not None and not self.ratio and not any(b is not None for b in budgets)

    def vocab_text(self) -> str | None:
        """The TEXT of --vocab keep:TEXT; None where --vocab is a number or not given."""
        vocab = self.vocab or ""
        return vocab.removeprefix(KEEP) if vocab.startswith(KEEP) else None

    def vocab_count(self, tokens: int) -> int:
        """How many of so many ``tokens`` --vocab keeps, where it is a number or a share."""
        assert self.vocab is not None
        share = self.vocab.endswith("%")
        return round(float(self.vocab[:-1]) / 100 * tokens) if share else int(self.vocab)

    def calibration_texts(self) -> list[str]:
        """The names of the calibration texts but for the one that the model writes."""
        return [name for name in source_names(self.calib) if name != SELF]

    def _check_layout(self) -> None:
        """InputError when --layout rules out what stands beside it."""
        if self.layout == "deci" and "attention" in self.structures:
            raise InputError(
                "--layout deci keeps every query head, which engines that read DeciLM ask for, so "
                "no KV group can go; use --structures mlp, sublayer or mlp,sublayer, or --layout "
                "per-layer"
            )
        if self.layout == "uniform" and "sublayer" in self.structures:
            raise InputError(
                "--layout uniform makes every layer the same size, so no sublayer can go alone; "
                "use --layout per-layer with --structures sublayer"
            )
        if self.layout == "uniform" and (
            self.layers not in (None, ALL) or self.allocation not in ("auto", "uniform")
        ):
            raise InputError(
                "--layout uniform makes every layer the same size: "
                "use it with --allocation uniform and without --layers"
            )

    def _check_stream(self) -> None:
        """InputError when --stream stands beside what needs the whole model in memory."""
        if not self.stream:
            return
        if self.vocab is not None:
            raise InputError(
                "--stream reads the embedding from the files as it is; trim with --vocab in a run "
                "without --stream"
            )
        if self.target_latency is not None:
            raise InputError(
                "--stream keeps the weights on disk, so decoding cannot be timed; "
                "use --target-bytes, --target-params or --ratio"
            )
        if SELF in source_names(self.calib):
            raise InputError(
                "--stream runs a layer at a time, --calib self writes text with the whole model; "
                "calibrate on another text"
            )

    def selected_layers(self, count: int) -> range:
        """The layers that ``--layers A:B`` selects of ``count``; negative ends count backward."""
        if self.layers in (None, ALL):
            return range(count)
        match = re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?", self.layers or "")
        if not match:
            raise InputError(f"--layers must be written A:B, for example 3:27, not '{self.layers}'")
        bounds = [int(text) if text else None for text in match.groups()]
        selected = range(count)[slice(*bounds)]
        if not selected or any(b is not None and abs(b) > count for b in bounds):
            raise InputError(
                f"--layers {self.layers} selects nothing usable of {count} layers; A:B "
                "are the layers from A to B - 1, counted from 0"
            )
        return selected
