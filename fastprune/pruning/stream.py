"""Score, measure and cut a model that is larger than memory: one layer's weights at a time.

What stays between layers are hidden states, on the host. Forward and backward pass alike visit
every layer once for all windows; the backward pass computes a layer's forward again. Every step
is the in-memory one on the same shapes in the same order, so scores, plans, weights and
perplexities are the same bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.inspect.perplexity import (
    Perplexity,
    batches,
    chunked_loss,
    loss_and_hidden_grad,
    measured,
)
from fastprune.models.checkpoint import LAYER_KEY, Form, save_checkpoint
from fastprune.models.families import geometries, sublayers
from fastprune.models.modeling import per_layer_config
from fastprune.models.shards import ShardWriter
from fastprune.models.streamed import NORM, StreamedModel, skeleton
from fastprune.precision import fast_forward
from fastprune.pruning.compensation import Prefix
from fastprune.pruning.importance import (
    ACTIVATION,
    MAGNITUDE,
    TAYLOR,
    Scores,
    TaylorSums,
    Units,
    activation,
    checked,
    inputs_of,
    magnitude,
    only_gradients_of,
    random,
)
from fastprune.pruning.obs import obs
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.sensitivity import change, increases, mean_changes
from fastprune.pruning.sublayers import MODULES, loss_increases, without
from fastprune.pruning.surgery import cut_parameter


def score(source: StreamedModel, windows: Tensor, method: str, *, seed: int = 0) -> Scores:
    """What `importance.score` gives for the model in memory; windows are token ids (n, s).

    The host keeps (layers + 1)·n·s hidden states for Taylor scores, n·s for activation.
    """
    if method in TAYLOR:
        scores = _taylor(source, windows, TAYLOR[method])
    elif method in MAGNITUDE:
        kind = MAGNITUDE[method]
        scores = Scores.of(magnitude(layer, kind) for _, layer in source.layers("scoring"))
    elif method in ACTIVATION:
        scores = Scores.of(_activations(source, windows, method))
    elif method == "obs":
        scores = Scores.of(_obs(source, windows))
    else:
        scores = random(geometries(source.model), seed)
    return checked(scores, method, source.model)


@torch.no_grad()
def removal(source: StreamedModel, windows: Tensor) -> tuple[list[float], float]:
    """What `sensitivity.removal` gives for the model in memory; windows are token ids (n, s).

    The hidden states of all variants travel side by side, so that every layer is loaded once: the
    host keeps (layers + 1)·n·s of them.
    """
    rows = distributed.share(windows.split(1))
    dense = source.embed(rows)
    variants: list[list[Tensor]] = []
    for index, _ in source.layers("layer sensitivity"):
        variants = [_run(source, index, hidden) for hidden in variants]
        variants.append(dense)  # the variant that skips this layer
        dense = _run(source, index, dense)
    return increases(_losses(source, [*variants, dense], rows), windows, source.model)


@torch.no_grad()
def sublayer_losses(source: StreamedModel, windows: Tensor) -> list[tuple[float, float]]:
    """What `sublayers.sublayer_losses` gives for the model in memory; windows are ids (n, s).

    As in `removal` the variants travel side by side: the host keeps (2·layers + 1)·n·s hidden
    states.
    """
    rows = distributed.share(windows.split(1))
    dense = source.embed(rows)
    variants: list[list[Tensor]] = []
    for index, layer in source.layers("sublayer sensitivity"):
        variants = [_run(source, index, hidden) for hidden in variants]
        for kind in MODULES:
            with without(layer, kind):
                variants.append(_run(source, index, dense))
        dense = _run(source, index, dense)
    totals = _losses(source, [*variants, dense], rows)
    pairs = list(zip(totals[:-1:2], totals[1:-1:2], strict=True))
    return loss_increases(pairs, totals[-1], windows, source.model)


def _losses(
    source: StreamedModel, variants: list[list[Tensor]], rows: tuple[Tensor, ...]
) -> list[float]:
    """Summed loss of each variant of the last layer's outputs."""
    totals = [0.0] * len(variants)
    with source.loaded("lm_head") as head:
        for number, variant in enumerate(variants):
            for hidden, ids in zip(variant, rows, strict=True):
                final = source.blocks.norm(hidden.to(source.device))
                totals[number] += chunked_loss(final, head, ids.to(source.device))[0].item()
    return totals


@torch.no_grad()
def layer_activation(source: StreamedModel, windows: Tensor) -> list[float]:
    """What `sensitivity.activation` gives for the model in memory; windows are token ids (n, s)."""
    hidden = source.embed(distributed.share(windows.split(1)))
    totals = []
    for index, _ in source.layers("layer sensitivity"):
        after = _run(source, index, hidden)
        totals.append(sum(map(change, hidden, after)))
        hidden = after
    return mean_changes(totals, windows, source.model)


@torch.no_grad()
def evaluate(source: StreamedModel, windows: Tensor) -> Perplexity:
    """Perplexity on token ``windows`` (n, s), as `perplexity.evaluate` measures it in memory."""
    start = time.perf_counter()
    rows = distributed.share(batches(windows))
    hidden = source.embed(rows)
    for index, _ in source.layers("evaluating"):
        hidden = _run(source, index, hidden)
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    with source.loaded("lm_head") as head:
        for states, ids in zip(hidden, rows, strict=True):
            final = source.blocks.norm(states.to(source.device))
            total += chunked_loss(final, head, ids.to(source.device))[0]
    distributed.sum_(total)
    return measured(total, windows, start)


def cut(source: StreamedModel, plan: Plan, calibration: Tensor | None, directory: Path) -> None:
    """Write the checkpoint that ``plan`` leaves of ``source`` into the folder ``directory``.

    The first process writes; the others do their share of the calibration and wait for it.

    With token windows ``calibration`` (n, s) what is kept is refitted as `compensate` does.
    InputError when the plan is of another model.
    """
    plan.check_model(geometries(source.model))
    if distributed.rank() > 0:
        _follow(source, plan, calibration)
        distributed.wait()
        return
    target = skeleton(per_layer_config(source.model.config, plan.result()), source.dtype)
    target.generation_config = source.model.generation_config

    @torch.no_grad()
    def write(form: Form, folder: Path) -> None:
        prefix = None
        if calibration is not None:
            with source.loaded("model.embed_tokens"):
                prefix = Prefix(source.model, calibration)
        with ShardWriter(folder, form.state) as out:
            for name in form.state:
                if not LAYER_KEY.fullmatch(name):
                    out.write(name, source.read(name))
            for index, layer in source.layers("surgery"):
                if prefix is not None:
                    prefix.refit(plan.layers[index])
                for name, tensor in _kept(layer, plan.layers[index]):
                    # What belonged to a removed sublayer has no place in the form.
                    new = f"model.layers.{form.layers.get(index)}.{name}"
                    if new in form.state:
                        out.write(new, tensor)

    save_checkpoint(target, source.tokenizer, directory, write)
    distributed.wait()


@torch.no_grad()
def _follow(source: StreamedModel, plan: Plan, calibration: Tensor | None) -> None:
    """This process's share of the calibration while the first one writes."""
    if calibration is None:
        return
    with source.loaded("model.embed_tokens"):
        prefix = Prefix(source.model, calibration)
    for index, _ in source.layers("compensating"):
        prefix.refit(plan.layers[index])


def _kept(layer: nn.Module, kept: LayerPlan) -> Iterator[tuple[str, Tensor]]:
    """The parameters of ``layer`` by name, cut to the units ``kept`` of it, one at a time."""
    owners = {
        name: (slices, kept.kept[sublayer.kind])
        for sublayer in sublayers(layer)
        for name, slices in sublayer.owned.items()
    }
    for name, parameter in layer.named_parameters():
        tensor = parameter.detach()
        if name in owners:
            tensor = cut_parameter(tensor, *owners[name])
        yield name, tensor


def _run(source: StreamedModel, index: int, hidden: list[Tensor]) -> list[Tensor]:
    return [source.blocks.run(index, h.to(source.device)).cpu() for h in hidden]


@torch.no_grad()
def _activations(source: StreamedModel, windows: Tensor, method: str) -> Iterator[Units]:
    hidden = source.embed(distributed.share(batches(windows)))
    for index, layer in source.layers("activations"):
        with inputs_of([layer]) as seen, fast_forward(source.device, source.dtype):
            hidden = _run(source, index, hidden)
        yield activation(layer, seen, method)


@torch.no_grad()
def _obs(source: StreamedModel, windows: Tensor) -> Iterator[Units]:
    with source.loaded("model.embed_tokens"):
        prefix = Prefix(source.model, windows, random=False)
    for index, _ in source.layers("scoring"):
        yield obs(prefix, index)


def _taylor(source: StreamedModel, windows: Tensor, kind: str) -> Scores:
    rows = distributed.share(windows.split(1))
    sums = TaylorSums(geometries(source.model), kind, source.dtype, source.device)
    hidden = source.embed(rows)
    inputs: list[list[Tensor]] = []
    for index, layer in source.layers("scoring, forward"):
        inputs.append(hidden)
        # With gradients, though none are taken: kernels may be chosen by that.
        with only_gradients_of(layer, sums.hooks(index, layer)):
            hidden = [_through(source, index, h)[1].detach().cpu() for h in hidden]
    gradients = _final_gradients(source, hidden, rows, sums.scale)
    for index, layer in source.layers("scoring, backward", range(len(inputs) - 1, -1, -1)):
        with only_gradients_of(layer, sums.hooks(index, layer)):
            for number, h in enumerate(inputs.pop()):
                before, after = _through(source, index, h)
                after.backward(gradients[number].to(source.device))
                if before.grad is not None:
                    gradients[number] = before.grad.cpu()
    return sums.scores(len(windows))


def _through(source: StreamedModel, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of layer ``index``; as in the whole model, embeddings need no gradient."""
    before = hidden.to(source.device).detach().requires_grad_(index > 0)
    with fast_forward(source.device, source.dtype):
        return before, source.blocks.run(index, before)


def _final_gradients(
    source: StreamedModel, hidden: list[Tensor], rows: tuple[Tensor, ...], scale: float
) -> list[Tensor]:
    """Gradients of ``scale`` times each window's mean loss for the last layer's outputs."""
    gradients = []
    with (
        source.loaded("lm_head") as head,
        only_gradients_of(source.model.get_submodule(NORM), {}),
    ):
        assert isinstance(head, nn.Linear)
        for h, ids in zip(hidden, rows, strict=True):
            before = h.to(source.device).detach().requires_grad_()
            with fast_forward(source.device, source.dtype):
                final = source.blocks.norm(before)
            _, gradient = loss_and_hidden_grad(final.detach(), head, ids.to(source.device))
            final.backward(gradient * scale)
            assert before.grad is not None
            gradients.append(before.grad.cpu())
    return gradients
