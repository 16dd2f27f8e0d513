"""What each stage of `prune` costs, computed from sizes alone: nothing is run.

A stage's cost is the sum of its matrix products (`products`), its copies and its peak memory, for
the process that has most to do. Operations, copies and bytes of weights are exact for this code;
peaks count what is large (weights, activations kept for the backward pass, one gradient, moment
matrices and their factors, a chunk of logits) and leave out the allocator's own losses. How much
the exchange tries depends on what it finds: its cost is an upper bound. The losses that weigh whole
sublayers against thinned ones are not among the stages.
`tests/pruning/test_cost.py` measures them on small models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastprune.models.forward import BATCH_TOKENS
from fastprune.pruning.calibration import TEXT_PER_RANDOM
from fastprune.pruning.compensation import STRENGTHS
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.curves import CHANNEL_LEVELS, KL_SHARE
from fastprune.pruning.divergence import TOP
from fastprune.pruning.importance import ACTIVATION, MAGNITUDE, TAYLOR
from fastprune.pruning.moments import symmetric_rows
from fastprune.pruning.products import FP32, Cost, LayerShape, ModelShape, product, total


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, and the most memory it needs, on the device and on the host.

    ``runs`` says whether the settings ask for it.
    """

    name: str
    cost: Cost
    device_bytes: int
    host_bytes: int
    runs: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields, the cost's among them, as JSON knows them."""
        fields = asdict(self)
        return {**fields.pop("cost"), **fields}


class Costs:
    """The stages of one run of ``config`` on a model of shape ``model``.

    ``kept`` is the shape of the result, ``ranks`` the number of processes that share the
    calibration, ``stream`` whether weights stay on disk.
    """

    def __init__(
        self,
        model: ModelShape,
        kept: ModelShape,
        config: PruneConfig,
        *,
        ranks: int = 1,
        stream: bool = False,
    ) -> None:
        self.model, self.kept, self.config = model, kept, config
        self.ranks, self.stream = ranks, stream
        assert config.calib_seq_len and config.eval_seq_len and config.calib_samples  # decided
        self.rounds = config.exchange_rounds or 0
        self.n, self.s = config.calib_samples, config.calib_seq_len
        self.tested = config.eval_seq_len
        self.searched = min(config.search_samples, self.n)
        self.mine = _share(self.n, ranks)
        self.batch = max(1, BATCH_TOKENS // self.s)
        self.batches = _split(self.n, self.batch)[::ranks]

    def stages(self) -> list[Stage]:
        """Every stage in the order in which a run passes them; `search` only in memory."""
        refit, steps = self.config.compensate != "none", self.config.iterations
        rule = self.config.allocation in ("inverse", "proportional")
        found = [
            self.evaluate("evaluate before", self.model),
            _times(self.score(), steps),
            replace(
                _times(self.sensitivity(), steps),
                runs=rule and self.config.layer_importance in ("removal", "activation"),
            ),
        ]
        if not self.stream:
            search = self.config.allocation == "search"
            found.append(replace(_times(self.search(), steps), runs=search))
            rounds = search and self.rounds > 0
            found.append(replace(_times(self.exchange(), steps), runs=rounds))
        last, before = self.compensate(), self.compensate(random=False)
        found += [
            replace(last, cost=last.cost + before.cost * (steps - 1), runs=refit),
            self.surgery(),
            self.evaluate("evaluate after", self.kept),
        ]
        return found

    def score(self) -> Stage:
        """Scores of all units by the criterion that ``config`` names."""
        method = self.config.importance
        if method in TAYLOR:
            return self._taylor()
        if method in ACTIVATION:
            return self._activation()
        if method == "obs":
            return self._obs()
        # magnitude reads every weight once; random reads nothing
        touched = self.model.block_bytes if method in MAGNITUDE else 0
        cost = Cost(moved=touched, read=touched if self.stream else 0)
        return Stage("score", cost, self._resident(self.model), 0)

    def sensitivity(self) -> Stage:
        """The loss with each layer skipped in turn, or what each changes in one forward pass."""
        if self.config.layer_importance == "activation":
            return self._changes()
        m, s = self.model, self.s
        n = _share(min(self.config.sensitivity_samples, self.n), self.ranks)
        depth = len(m.layers)
        cost = total(m.forward(layer, 1, s) * (index + 1) for index, layer in enumerate(m.layers))
        cost = (cost + m.head(s - 1) * (depth + 1)) * n
        host = 0
        if self.stream:
            passes = depth * (depth + 1) // 2  # layer l runs for l + 1 variants
            cost += Cost(host=m.states(n * s) * (2 * passes + 1 + depth + 1))
            cost += self._pass()
            host = m.states(n * s) * (depth + 1)
        cost += Cost(reduced=self._reduced((depth + 1) * 8))
        device = self._resident(m) + max(m.logits(s - 1), self._live(m, s)) + 3 * m.states(s)
        return Stage("sensitivity", cost, device, host)

    def _changes(self) -> Stage:
        m, s = self.model, self.s
        n = _share(min(self.config.sensitivity_samples, self.n), self.ranks)
        cost = total(m.forward(layer, 1, s) for layer in m.layers) * n
        cost += Cost(reduced=self._reduced(8 * len(m.layers)))
        host = 0
        if self.stream:
            host = m.states(n * s)
            cost += Cost(host=host * (1 + 2 * len(m.layers)), read=m.block_bytes + m.table_bytes)
        device = self._resident(m, head=False) + self._live(m, s) + 3 * m.states(s)
        return Stage("sensitivity", cost, device, host)

    def search(self) -> Stage:
        """Divergence curves of every sublayer, each level run to the end."""
        cost, device = self._sweep(self._levels, thinned=False)
        return Stage("search", cost, device, 0)

    def exchange(self) -> Stage:
        """What follows the search, at most: when both mixes of every round are tried and fail.

        A trial is counted as a compensation of the result, on all windows of the search.
        """
        rounds, m = self.rounds, self.model
        if not rounds or not any(map(self._thinned, m.layers)):
            return Stage("exchange", Cost(), m.bytes, 0)
        judged = max(1, self.searched // KL_SHARE) * self.s
        layers = total(m.forward(layer, 1, judged) for layer in m.layers)
        trial = layers + m.head(judged)
        outputs = (x[-1] for layer in m.layers for x in (layer.attention, layer.mlp) if x)
        device, host = m.bytes, m.item * sum(rows * columns for rows, columns in outputs)
        if self.config.compensate != "none":
            text = replace(self.config, calib_samples=self.searched)
            few = Costs(m, self.kept, text, ranks=self.ranks, stream=self.stream)
            refit = few.compensate(random=False)
            trial += refit.cost
            device, host = refit.device_bytes, host + refit.host_bytes
        sweep, swept = self._sweep(self._beside, thinned=True)
        again = 3 + 3 * rounds
        return Stage("exchange", sweep * rounds + trial * again, max(device, swept), host)

    def _sweep(
        self, levels_of: Callable[[LayerShape], list[tuple[int, int, int]]], *, thinned: bool
    ) -> tuple[Cost, int]:
        """Cost and bytes on the device of `measure_curves` at the levels of every layer.

        Of a model that is ``thinned`` refits have targets, for which the dense one runs beside it.
        """
        m, s, refits = self.model, self.s, self.config.compensate != "none"
        judged = max(1, self.searched // KL_SHARE)
        fit = _split(self.searched - judged, self.batch)[:: self.ranks] if refits else []
        kl = _split(judged, self.batch)
        tail = [Cost()]  # of the layers from the end, over all windows that judge
        for layer in reversed(m.layers):
            tail.append(tail[-1] + total(m.forward(layer, n, s) for n in kl))
        tail.reverse()
        head = total(m.head(n * s) for n in kl)
        cost = tail[0] + head  # the dense distributions
        widest = moments = aside = 0
        for index in self.config.selected_layers(len(m.layers)):
            levels = levels_of(m.layers[index])
            mine = levels[:: self.ranks]
            cost += (tail[index] + head) * len(mine)
            cost += Cost(reduced=self._reduced(8 * len(levels)))
            aside = max([aside, *(m.item * rows * columns for rows, columns, _ in levels)])
            if not refits:
                continue
            layer = m.layers[index]
            cost += total(_refit(*level, targets=thinned) for level in mine if level[2])
            widest = max([widest, *(_refit_bytes(*level, targets=thinned) for level in levels)])
            # attention and MLP apart, even where they are of one width
            linears = [matrices[-1] for matrices in self._thinned(layer)]
            shapes = [(columns, rows if thinned else 0) for rows, columns in linears]
            for shape in shapes:
                cost += total(_moments(*shape, n * s) for n in fit)
                cost += Cost(reduced=self._reduced(2 * _moment_bytes(*shape) + 16))
            moments = max(moments, sum(2 * _moment_bytes(*shape) for shape in shapes))
            if linears:
                cost += total(m.to_attention_output(layer, n, s) for n in fit)
            if linears and self._thinned(layer)[-1] is layer.mlp:
                cost += total(m.rest(layer, n, s, down=False) for n in fit)
        # every layer once more, to step past it
        passes = total(m.forward(layer, n, s) for layer in m.layers for n in fit)
        cost += passes * (1 + thinned) + tail[0]
        states = m.states((judged + sum(fit) * (3 if thinned else 1)) * s)
        targets = judged * s * (TOP * 8 + (TOP + 1) * FP32)
        wide = max(self._live(m, n * s) for n in [*kl, *fit])
        most = max(widest, aside + max(wide, m.logits(judged * s)))
        device = m.bytes + states + targets + moments + most
        return cost, device

    def compensate(self, *, random: bool = True) -> Stage:
        """Refits of o_proj and down_proj of every layer that loses units."""
        m, s = self.model, self.s
        batches = self._fitting() if random else self.batches
        tokens, peak = batches[0] * s, 0
        states = m.states(sum(batches) * s)
        cost, copies = Cost(host=states), 1  # embeddings, to the host
        for layer, kept in zip(m.layers, self.kept.layers, strict=True):
            thinned = [
                kind
                for kind in ("attention", "mlp")
                if getattr(layer, kind)
                and (not getattr(kept, kind) or getattr(kept, kind)[-1] != getattr(layer, kind)[-1])
            ]
            copies = max(copies, 1 + bool(thinned))
            if copies > 1:  # the dense model's own hidden states beside those of the prefix
                cost += total(m.forward(layer, n, s) for n in batches) + Cost(host=2 * states)
            for kind in thinned:
                if kind == "attention" and layer.mlp:
                    copies = 3  # those between the two sublayers
                    cost += Cost(host=states)
                if not getattr(kept, kind):
                    continue
                (rows, columns), left = getattr(layer, kind)[-1], getattr(kept, kind)[-1][1]
                cost += self._moments(layer, kind, batches, targets=True)
                cost += _refit(rows, columns, left, targets=True)
                cost += Cost(reduced=self._reduced(2 * _moment_bytes(columns, rows) + 16))
                peak = max(peak, _refit_bytes(rows, columns, left, targets=True))
                peak = max(peak, 2 * _moment_bytes(columns, rows) + self._live(m, tokens))
            cost += total(m.forward(layer, n, s) for n in batches) + Cost(host=2 * states)
        if self.stream:
            cost += Cost(read=m.table_bytes)
        device = self._resident(m, head=False) + max(peak, self._live(m, tokens))
        return Stage("compensate", cost, device, copies * states)

    def surgery(self) -> Stage:
        """Kept rows and columns copied out; one tensor at a time beside the model."""
        largest = max(
            rows * columns for layer in self.kept.layers for rows, columns in layer.matrices
        )
        cost = Cost(moved=2 * self.kept.block_bytes)
        if self.stream:
            tables = 1 if self.model.tied else 2
            cost += Cost(read=self.model.block_bytes + tables * self.model.table_bytes)
        device = self._resident(self.model) + largest * self.model.item
        return Stage("surgery", cost, device, 0)

    def evaluate(self, name: str, model: ModelShape) -> Stage:
        """Perplexity on the evaluation windows."""
        n, s = self.config.eval_windows, self.tested
        batches = _split(n, max(1, BATCH_TOKENS // s))[:: self.ranks]
        cost = total(model.forward(layer, b, s) for layer in model.layers for b in batches)
        cost += total(model.head(b * (s - 1)) for b in batches)
        host = 0
        if self.stream:
            host = model.states(sum(batches) * s)
            cost += Cost(host=host * (2 * len(model.layers) + 2)) + self._pass(model)
        cost += Cost(reduced=self._reduced(16))
        tokens = batches[0] * s
        device = self._resident(model) + max(model.logits(tokens), self._live(model, tokens))
        return Stage(name, cost, device + model.states(tokens), host)

    def _taylor(self) -> Stage:
        m, s = self.model, self.s
        n = self.mine
        forward = total(m.forward(layer, 1, s) for layer in m.layers)
        backward = total(
            m.backward(layer, s, first=index == 0) + m.reduction(layer)
            for index, layer in enumerate(m.layers)
        )
        cost = (forward * (2 if self.stream else 1) + backward + m.head(s - 1) * 2) * n
        units = sum(layer.kv_heads + layer.channels for layer in m.layers)
        cost += Cost(reduced=self._reduced(8 * units))
        gradient = max(rows * columns for layer in m.layers for rows, columns in layer.matrices)
        gradient *= m.item
        wide = 3 * s * max(layer.channels for layer in m.layers) * m.item
        saved, host = sum(m.saved(layer, s) for layer in m.layers), 0
        if self.stream:
            depth = len(m.layers)
            # embeddings out; forward in and out; inputs and gradients in, gradients out; final in,
            # gradient out. The first layer gives no gradient back.
            copies = 1 + 2 * depth + 2 * depth + (depth - 1) + 2
            cost += Cost(host=m.states(n * s) * copies)
            cost += self._pass() + Cost(read=m.block_bytes)
            host = m.states(n * s) * (depth + 2)
            saved = max(m.saved(layer, s) for layer in m.layers)
        device = self._resident(m) + saved + m.states(s) + max(m.logits(s - 1), gradient + wide)
        return Stage("score", cost, device, host)

    def _activation(self) -> Stage:
        m, s = self.model, self.s
        n, tokens = sum(self.batches), self.batches[0] * s
        cost = total(m.forward(layer, b, s) for layer in m.layers for b in self.batches)
        columns = sum(columns for layer in m.layers for _, columns in layer.matrices)
        cost += Cost(reduced=self._reduced(8 * (columns + 2 * len(m.layers))))
        host = 0
        if self.stream:
            host = m.states(n * s)
            cost += Cost(host=host * (1 + 2 * len(m.layers)), read=m.block_bytes + m.table_bytes)
        squares = tokens * max(layer.channels for layer in m.layers) * FP32
        device = self._resident(m, head=False) + self._live(m, tokens) + squares
        return Stage("score", cost, device, host)

    def _obs(self) -> Stage:
        m, s = self.model, self.s
        states = m.states(sum(self.batches) * s)
        cost, peak = Cost(host=states), 0
        for layer in m.layers:
            for kind in ("attention", "mlp"):
                if not (matrices := getattr(layer, kind)):
                    continue
                rows, columns = matrices[-1]
                # inverse by Cholesky, and a Schur complement and a refit whose sizes shrink to
                # nothing: in the mean a third and a half of the first; all of it in every process
                cost += self._moments(layer, kind, self.batches, targets=False)
                flops = columns**3 + 2 * columns**3 // 3 + rows * columns**2
                cost += Cost(flops, flops)  # in fp64, whose rate is no better than that of fp32
                cost += Cost(reduced=self._reduced(2 * _moment_bytes(columns) + 16))
                peak = max(peak, 2 * _moment_bytes(columns) + 8 * (4 * columns**2 + rows * columns))
            cost += total(m.forward(layer, n, s) for n in self.batches) + Cost(host=2 * states)
        if self.stream:
            cost += Cost(read=m.block_bytes + m.table_bytes)
        peak = max(peak, self._live(m, self.batches[0] * s))
        return Stage("score", cost, self._resident(m, head=False) + peak, states)

    def _fitting(self) -> list[int]:
        """Windows of the batches that a process fits on when random tokens are beside the text."""
        random = _split(self.n // TEXT_PER_RANDOM, self.batch)
        return (_split(self.n, self.batch) + random)[:: self.ranks]

    def _moments(
        self, layer: LayerShape, kind: str, batches: Sequence[int], *, targets: bool
    ) -> Cost:
        """Moments of the inputs of o_proj or down_proj over ``batches``, each taken to there."""
        m, s = self.model, self.s
        rows, columns = getattr(layer, kind)[-1]
        rows = rows if targets else 0
        cost = Cost(host=m.states(sum(batches) * s) * (1 + targets))
        for n in batches:
            cost += m.to_attention_output(layer, n, s) + _moments(columns, rows, n * s)
            if kind == "mlp":
                cost += m.rest(layer, n, s, down=False)
        return cost

    def _thinned(self, layer: LayerShape) -> list[tuple[tuple[int, int], ...]]:
        """The sublayers whose units the search takes away."""
        kinds = (("attention", layer.kv_heads), ("mlp", layer.channels))
        return [
            getattr(layer, kind)
            for kind, units in kinds
            if units > 1 and kind in self.config.structures
        ]

    def _levels(self, layer: LayerShape) -> list[tuple[int, int, int]]:
        """(rows, columns, kept columns) of every thinning level that the search measures."""
        found = []
        if layer.attention and "attention" in self.config.structures:
            rows, columns = layer.attention[-1]
            width = columns // layer.kv_heads
            found += [(rows, columns, width * kept) for kept in range(layer.kv_heads - 1, 0, -1)]
        if layer.mlp and "mlp" in self.config.structures:
            rows, columns = layer.mlp[-1]
            removed = {round(share * columns) for share in CHANNEL_LEVELS} - {0, columns}
            found += [(rows, columns, columns - r) for r in sorted(removed)]
        if "sublayer" in self.config.structures:
            found += [(*m[-1], 0) for m in (layer.attention, layer.mlp) if m]
        return found

    def _beside(self, layer: LayerShape) -> list[tuple[int, int, int]]:
        """One level less and one more of every sublayer, as wide as can be."""
        return [(*matrices[-1], matrices[-1][1]) for matrices in self._thinned(layer)] * 2

    def _resident(self, model: ModelShape, *, head: bool = True) -> int:
        """Bytes of weights on the device at a time."""
        if not self.stream:
            return model.bytes
        layer = max(layer.parameters for layer in model.layers) * model.item
        return max(layer, model.table_bytes) if head else layer

    def _live(self, model: ModelShape, tokens: int) -> int:
        """Bytes of the activations of the widest point of a layer that no backward pass follows."""
        widths = [
            max(3 * layer.channels + model.hidden, 3 * layer.query + 2 * layer.keys)
            for layer in model.layers
        ]
        return tokens * (max(widths) + model.hidden) * model.item

    def _pass(self, model: ModelShape | None = None) -> Cost:
        """Weights read once: embeddings, layers, head."""
        model = model or self.model
        return Cost(read=model.block_bytes + 2 * model.table_bytes)

    def _reduced(self, count: int) -> int:
        return count if self.ranks > 1 else 0


def _times(stage: Stage, steps: int) -> Stage:
    """A stage that runs in each of so many iterations."""
    return replace(stage, cost=stage.cost * steps)


def _share(count: int, ranks: int) -> int:
    """What the busiest of ``ranks`` processes gets of so many items."""
    return -(-count // ranks)


def _split(count: int, size: int) -> list[int]:
    whole, rest = divmod(count, size)
    return [size] * whole + ([rest] if rest else [])


def _moment_bytes(columns: int, rows: int = 0) -> int:
    """XᵀX and the sums of x, and with the ``rows`` of targets theirs."""
    targets = rows * (columns + 1) + 1 if rows else 0
    return ((columns + 1) * columns + targets) * FP32


def _moments(columns: int, rows: int, tokens: int) -> Cost:
    """XᵀX of one batch, and TᵀX with targets, added to the sums so far, in fp32."""
    shapes = [(end - start, columns - start) for start, end in symmetric_rows(columns)]
    if rows:
        shapes.append((rows, columns))
    return total(product(n, tokens, k, FP32) + Cost(moved=n * k * FP32) for n, k in shapes)


def _refit(rows: int, columns: int, kept: int, *, targets: bool) -> Cost:
    """The least-squares update for every strength, and the errors that choose among them, in fp32.

    A Cholesky factor of n columns takes n³/3 operations, two triangular solves 2·rows·n².
    """
    change = product(rows, columns, columns, FP32)
    judge = change + product(1, rows * columns, 1, FP32)
    flops = kept**3 // 3 + 2 * rows * kept**2
    solve = Cost(flops, flops, (3 * kept**2 + 2 * rows * kept) * FP32)
    cross = product(rows, columns - kept, kept, FP32)
    return judge * (2 + len(STRENGTHS)) + change * (2 * targets) + cross + solve * len(STRENGTHS)


def _refit_bytes(rows: int, columns: int, kept: int, *, targets: bool) -> int:
    """Two moment matrices; the kept part of one, damped, and its factor; and some weights."""
    factors = columns * kept + 3 * kept**2
    weights = (7 if targets else 5) * rows * columns
    moments = 2 * _moment_bytes(columns, rows if targets else 0)
    return moments + (factors + weights) * FP32
