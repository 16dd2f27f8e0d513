"""What the stages of `prune` take, estimated from sizes alone: nothing is run.

A pass through the layers takes two operations for each weight and token, and the products of the
attention. A stage is so many passes; refits add the products of their moments and solutions, in
fp32. A peak is the weights and the buffers that are large. Left out are norms, masks, rotary
tables, traffic between memories, and the allocator's losses. All figures are of the process that
has most to do.

`tests/pruning/test_estimate.py` holds that against small real runs: operations within 15 %, peaks
within 30 %, files within 2 %. All layers count as alike where a stage runs those behind each one.
The exchange is an upper bound, for it ends when it finds nothing better. Not among the stages are
the losses that weigh whole sublayers against thinned ones, and how far the result of a search
diverges, which takes two passes of the windows that judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from torch import nn

from fastprune.models.families import decoder_layers, sublayers
from fastprune.models.forward import BATCH_TOKENS, CHUNK_LOGITS, decoder_and_head
from fastprune.models.units import Sublayer
from fastprune.pruning.calibration import TEXT_PER_RANDOM
from fastprune.pruning.compensation import STRENGTHS
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import CHANNEL_LEVELS, KL_SHARE
from fastprune.pruning.divergence import TOP
from fastprune.pruning.importance import ACTIVATION, TAYLOR
from fastprune.pruning.moments import ROWS

FP32 = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Stage:
    """What one process does in a stage, and the most memory that takes.

    ``flops`` are floating-point operations of matrix products and factorisations, ``single`` those
    of them in fp32 or fp64; ``read`` are bytes of weights read from files; ``runs`` says whether
    the settings ask for the stage.
    """

    name: str
    flops: int
    single: int
    device_bytes: int
    host_bytes: int = 0
    read: int = 0
    runs: bool = True


class Part:
    """A sublayer's sizes: its output matrix (rows, columns), ``inner`` numbers a token that its
    input matrices give and its output matrix reads, the ``weights`` that a token meets, and the
    ``largest`` of its tensors.

    Of a mixture the output matrix is that of one expert, and it is not refitted.
    """

    def __init__(self, layer: nn.Module, sublayer: Sublayer) -> None:
        self.kind, self.units = sublayer.kind, sublayer.units
        self.refits = sublayer.mixture is None
        if sublayer.mixture is not None:
            self._of_experts(layer, sublayer)
            return
        names = dict.fromkeys(s.name for s in sublayer.slices if s.parameter == "weight")
        matrices = [layer.get_parameter(name) for name in names]
        self.rows, self.columns = matrices[-1].shape
        self.inner = self.columns + sum(len(m) for m in matrices[:-1])
        self.weights = sum(m.numel() for m in matrices)
        self.largest = self.rows * self.columns

    def _of_experts(self, layer: nn.Module, sublayer: Sublayer) -> None:
        matrices = [layer.get_parameter(s.name) for s in sublayer.slices[-2:]]
        count, self.rows, self.columns = matrices[-1].shape
        self.inner = 3 * self.columns * sublayer.least
        every = sum(p.numel() for p in layer.get_submodule(sublayer.module).parameters())
        experts = sum(m.numel() for m in matrices)
        self.weights = every - experts + experts * sublayer.least // count
        self.largest = matrices[0].numel()

    def flops(self, length: int) -> int:
        """Operations on a window of ``length`` tokens; the attention counts as a full square."""
        square = 4 * length**2 * self.columns if self.kind == "attention" else 0
        return 2 * length * self.weights + square

    def fits(self, tokens: int, kept: Sequence[int], *, targets: bool) -> float:
        """Operations of moments over ``tokens``, and of refits to so many ``kept`` columns each.

        Of XᵀX the upper half is computed, of TᵀX all; a Cholesky factor of n columns takes n³/3,
        two triangular solves 2·rows·n², for every strength, and the errors that choose among them.
        """
        r, c = self.rows, self.columns
        flops = 2 * tokens * c * (c * (1 + 1 / ROWS) / 2 + r * targets)
        for k in kept:
            change = 2 * r * c**2
            flops += len(STRENGTHS) * (k**3 / 3 + 2 * r * k**2 + change)
            flops += 2 * (1 + targets) * change + 2 * r * (c - k) * k
        return flops

    def fit_bytes(self, kept: int = 0, *, targets: bool) -> int:
        """Bytes of the moments, to fit and held out; and of a refit to ``kept`` columns those of
        one damped, of its factor, and of the weights in trial."""
        r, c = self.rows, self.columns
        refit = c * kept + 3 * kept**2 + (5 + 2 * targets) * r * c if kept else 0
        return FP32 * (2 * c * (c + r * targets) + refit)


def _until(layer: Sequence[Part], part: Part, length: int) -> int:
    """Operations of a pass of a window that stops at the output matrix of ``part``."""
    before = layer[: layer.index(part) + 1]
    return sum(p.flops(length) for p in before) - 2 * length * part.rows * part.columns


class Sizes:
    """Bytes and operations of a causal language model, which may be on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        layers, (_, top) = decoder_layers(model), decoder_and_head(model)
        head, self.capped = top.weight, top.cap is not None
        self.layers = [[Part(layer, s) for s in sublayers(layer)] for layer in layers]
        self.parts = [part for layer in self.layers for part in layer]
        self.vocabulary, self.hidden = head.shape
        self.item, self.table = head.element_size(), head.nbytes
        each = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        self.block, self.layer = sum(each), max(each)
        self.bytes = sum(p.nbytes for p in model.parameters())
        self.largest = self.item * max((p.largest for p in self.parts), default=0)
        self.widest = max((part.columns for part in self.parts), default=0)

    def passes(self, length: int, layers: float, head: float = 0) -> float:
        """Operations of so many passes of a window through the layers, and through the head."""
        table = 2 * length * self.hidden * self.vocabulary
        return layers * sum(part.flops(length) for part in self.parts) + head * table

    def states(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.hidden * self.item

    def logits(self, tokens: int) -> int:
        """Bytes of the logits that stand at a time when so many tokens are predicted."""
        return min(tokens, max(1, CHUNK_LOGITS // self.vocabulary)) * self.vocabulary * self.item

    def logits_and_slopes(self, tokens: int) -> int:
        """The same, and those of the derivatives of soft-capped logits, for a gradient."""
        return self.logits(tokens) * (self.item + FP32 * self.capped) // self.item

    def live(self, tokens: int) -> int:
        """Bytes of a layer's activations at their widest, where no backward pass follows."""
        inner = max((part.inner for part in self.parts), default=0)
        return tokens * inner * self.item + 2 * self.states(tokens)

    def saved(self, tokens: int) -> list[int]:
        """Bytes that autograd keeps of each layer, what norms have read in fp32 among them."""
        numbers = [sum(part.inner + part.columns for part in layer) for layer in self.layers]
        norms = [len(layer) * self.hidden * (self.item + FP32) for layer in self.layers]
        return [tokens * (n * self.item + norm) for n, norm in zip(numbers, norms, strict=True)]


class Estimate:
    """The stages of a run by ``config``, which is `decided`, on ``model``; ``kept`` is its result.

    Both may be on the meta device; ``stream`` says that weights stay on disk.
    """

    def __init__(
        self, model: nn.Module, kept: nn.Module, config: PruneConfig, *, stream: bool = False
    ) -> None:
        assert config.calib_seq_len and config.calib_samples
        self.model, self.kept, self.config, self.stream = Sizes(model), Sizes(kept), config, stream
        self.n, self.s = config.calib_samples, config.calib_seq_len
        self.depth = len(self.model.layers)
        searched = min(config.search_samples, self.n)
        self.judged = max(1, searched // KL_SHARE)
        self.fitted = (searched - self.judged) * (config.compensate != "none")

    def stages(self) -> list[Stage]:
        """Every stage in the order in which a run passes them."""
        config, m, search = self.config, self.model, self.config.allocation == "search"
        ruled = config.allocation in ("inverse", "proportional")
        measured = config.layer_importance in ("removal", "activation")
        found = [
            self.score(),
            replace(self.sensitivity(), runs=ruled and measured),
            replace(self.search(), runs=search),
            replace(self.exchange(), runs=search and bool(config.exchange_rounds)),
            replace(self.compensate(self.n), runs=config.compensate != "none"),
        ]
        if config.only_trims:
            found = [replace(stage, runs=False) for stage in found]
        steps = config.iterations
        return [
            self.evaluate("evaluate before", self.model),
            *(replace(s, flops=s.flops * steps, single=s.single * steps) for s in found),
            # one tensor at a time is copied; each layer is read for compensation as well
            self._stage("surgery", 0, self._resident(m) + m.largest, 0, m.bytes),
            self.evaluate("evaluate after", self.kept),
        ]

    def evaluate(self, name: str, model: Sizes) -> Stage:
        """Perplexity on the evaluation windows."""
        s, windows = self.config.eval_seq_len, self.config.eval_windows
        assert s
        n, tokens = self._windows(windows, s)
        device = self._resident(model) + model.states(tokens)
        device += max(model.logits(tokens), model.live(tokens))
        read = model.block + 2 * model.table
        return self._stage(name, n * model.passes(s, 1, 1), device, model.states(n * s), read)

    def score(self) -> Stage:
        """Scores of all units by the criterion that the settings name."""
        m, s, method = self.model, self.s, self.config.importance
        n, tokens = self._windows(self.n, s)
        device, host, read = self._resident(m, head=False), m.states(n * s), m.block + m.table
        if method in TAYLOR:
            return self._taylor()
        if method in ACTIVATION:
            device += m.live(tokens) + tokens * m.widest * FP32
            return self._stage("score", n * m.passes(s, 1), device, host, read)
        if method == "obs":
            # In fp64: of n columns an inverse takes n³, Schur complements 2/3·n³ and updates of the
            # weights rows·n², as their sizes shrink to nothing.
            fits = sum(p.fits(n * s, (), targets=False) for p in m.parts)
            fits += sum(p.columns**2 * (5 / 3 * p.columns + p.rows) for p in m.parts)
            inverse = max(8 * p.columns * (4 * p.columns + p.rows) for p in m.parts)
            moments = max(p.fit_bytes(targets=False) for p in m.parts)
            device += max(m.live(tokens), moments + inverse)
            work = m.passes(s, 1) + sum(_until(layer, p, s) for layer in m.layers for p in layer)
            stage = self._stage("score", n * work, device, host, read, fits)
            return replace(stage, host_bytes=host)
        # the weights alone, or nothing
        return self._stage("score", 0, self._resident(m), 0, m.block * (method != "random"))

    def _taylor(self) -> Stage:
        """A backward pass takes what two forward passes do; with weights on disk each layer is run
        forward again before it."""
        m, s, n = self.model, self.s, ceil(self.n / self.config.ranks)
        saved = max(m.saved(s)) if self.stream else sum(m.saved(s))
        gradient = m.largest + 3 * s * m.widest * m.item
        device = self._resident(m) + saved + m.states(s) + max(m.logits_and_slopes(s), gradient)
        host, read = m.states(n * s) * (self.depth + 2), 2 * (m.block + m.table)
        return self._stage("score", n * m.passes(s, 3 + self.stream, 2), device, host, read)

    def sensitivity(self) -> Stage:
        """The loss with each layer skipped in turn, or what each changes in one forward pass."""
        m, s = self.model, self.s
        n = ceil(min(self.config.sensitivity_samples, self.n) / self.config.ranks)
        removal = self.config.layer_importance != "activation"
        variants = self.depth + 1 if removal else 1
        work = n * m.passes(s, variants / 2 if removal else 1, variants * removal)
        device = self._resident(m, head=removal) + 3 * m.states(s)
        device += max(m.live(s), m.logits(s) * removal)
        host, read = m.states(n * s) * variants, m.block + m.table * (1 + removal)
        return self._stage("sensitivity", work, device, host, read)

    def search(self) -> Stage:
        """Divergence of the whole model with each sublayer at each level, refitted.

        Levels of a streamed model travel side by side, in hidden states on the host.
        """
        m, s, judged, ranks = self.model, self.s, self.judged, self.config.ranks
        n, tokens = self._windows(self.fitted, s)
        work = judged * m.passes(s, 2, 1) + n * m.passes(s, 1)
        fits, moments, most, branches = 0.0, 0, m.logits(judged * s), 0
        for index in self.config.selected_layers(self.depth):
            levels = {part: self._levels(part) for part in m.layers[index]}
            count = ceil(sum(map(len, levels.values())) / ranks)
            branches += count
            work += judged * m.passes(s, count * (self.depth - index) / self.depth, count)
            refitted = {part: kept for part, kept in levels.items() if n and any(kept)}
            work += n * max((_until(m.layers[index], p, s) for p in refitted), default=0)
            for part, kept in refitted.items():
                fits += part.fits(n * s, kept[::ranks], targets=False)
                most = max(most, part.fit_bytes(max(kept), targets=False))
            moments = max(moments, sum(p.fit_bytes(targets=False) for p in refitted))
        targets, states = judged * s * (TOP * 8 + (TOP + 1) * FP32), m.states((judged + n) * s)
        device = self._resident(m) + targets + moments + states * (not self.stream)
        device += max(m.live(max(tokens, judged * s)), most)
        host, read = states + branches * m.states(judged * s), 2 * m.block + 5 * m.table
        return self._stage("search", work, device, host, read, fits)

    def exchange(self) -> Stage:
        """At most: a round takes what the search does, and tries two mixes in vain; three are tried
        before. A trial is a compensation, and a pass of the windows that judge."""
        m, rounds = self.model, self.config.exchange_rounds
        if not rounds:
            return self._stage("exchange", 0, self._resident(m))
        trials = 3 * (rounds + 1)
        search, refit = self.search(), self._stage("none", 0, 0)
        if self.fitted:
            refit = self.compensate(self.fitted, random=False)
        work, read = trials * self.judged * m.passes(self.s, 1, 1), trials * 2 * (m.block + m.table)
        tried = self._stage("exchange", work, max(search.device_bytes, refit.device_bytes), 0, read)
        return replace(
            tried,
            flops=tried.flops + rounds * search.flops + trials * refit.flops,
            single=tried.single + rounds * search.single + trials * refit.single,
            # the dense output matrices are kept
            host_bytes=m.item * sum(p.rows * p.columns for p in m.parts)
            + max(search.host_bytes, refit.host_bytes),
            read=tried.read + rounds * search.read,
        )

    def _levels(self, part: Part) -> list[int]:
        """Columns that ``part`` keeps at each level of the search; 0 where it is gone."""
        structures, width = self.config.structures, part.columns // part.units
        shares = {round(share * part.units) for share in CHANNEL_LEVELS} - {0, part.units}
        removed = range(1, part.units) if width > 1 else sorted(shares)
        kept = [part.columns - width * units for units in removed if part.kind in structures]
        return kept + [0] * ("sublayer" in structures)

    def compensate(self, windows: int, *, random: bool = True) -> Stage:
        """Refits of every sublayer that loses units: two passes for the hidden states as they
        become and as they were, and for each refit one that stops at its moments."""
        m, s = self.model, self.s
        n, tokens = self._windows(windows + random * (windows // TEXT_PER_RANDOM), s)
        live = m.live(tokens)
        work, fits, most, copies = m.passes(s, 2), 0.0, live, 2
        for layer, kept in zip(m.layers, self.kept.layers, strict=True):
            left = {part.kind: part.columns for part in kept}
            for part in layer:
                columns = left.get(part.kind, 0)
                if not 0 < columns < part.columns or not part.refits:
                    continue
                work += _until(layer, part, s)
                fits += part.fits(n * s, [columns], targets=True)
                moments = part.fit_bytes(targets=True)
                most = max(most, moments + live, part.fit_bytes(columns, targets=True))
                copies = max(copies, 2 + (part is not layer[-1]))  # those between two sublayers
        device, host = self._resident(m, head=False) + most, copies * m.states(n * s)
        stage = self._stage("compensate", n * work, device, host, m.table, fits)
        return replace(stage, host_bytes=host)

    def _stage(
        self, name: str, work: float, device: int, host: int = 0, read: int = 0, fits: float = 0
    ) -> Stage:
        """``work`` in the precision of the weights, ``fits`` in fp32 or fp64; ``host`` and ``read``
        are the bytes of a streamed run."""
        single = work + fits if self.model.item == FP32 else fits
        on_disk = self.stream * host, self.stream * read
        return Stage(name, round(work + fits), round(single), device, *on_disk)

    def _resident(self, model: Sizes, *, head: bool = True) -> int:
        """Bytes of weights on the device at a time."""
        if not self.stream:
            return model.bytes
        return max(model.layer, model.table) if head else model.layer

    def _windows(self, count: int, length: int) -> tuple[int, int]:
        """Of so many windows those that the busiest process runs, and the tokens of a batch."""
        batch = max(1, BATCH_TOKENS // length)
        mine = batch * ceil(ceil(count / batch) / self.config.ranks)
        return min(count, mine), min(count, batch) * length
