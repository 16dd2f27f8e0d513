"""Apply a plan to weights on disk: each layer goes straight from the old files to the new ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune.distributed import ALONE, Processes
from fastprune.models.adopted import config_with
from fastprune.models.checkpoint import LAYER_KEY, Form, save_checkpoint
from fastprune.models.families import geometries, sublayers
from fastprune.models.shards import ShardWriter
from fastprune.models.skeleton import skeleton
from fastprune.models.streamed import StreamedModel
from fastprune.pruning.calibration import Calibration, Prefix
from fastprune.pruning.compensation import refit_layer
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.surgery import cut_parameter, keep_scales


def write_cut(
    source: StreamedModel,
    plan: Plan,
    calibration: Calibration | None,
    directory: Path,
    processes: Processes = ALONE,
) -> None:
    """Write the checkpoint that ``plan`` leaves of ``source`` into the folder ``directory``.

    The first of ``processes`` writes; the others do their share of the calibration and wait for it.
    With ``calibration`` what is kept is refitted as `compensate` does. InputError when the plan is
    of another model.
    """
    plan.check_model(geometries(source.model))
    if not processes.first:
        for _ in _refitted(source, plan, calibration) if calibration is not None else ():
            pass
        processes.wait()
        return
    target = skeleton(config_with(source.model.config, plan.result()), source.dtype)
    target.generation_config = source.model.generation_config

    def write(form: Form, folder: Path) -> None:
        with ShardWriter(folder, form.state) as out:
            for name in form.state:
                if not LAYER_KEY.fullmatch(name):
                    out.write(name, source.read(name))
            for index, layer in _refitted(source, plan, calibration):
                keep_scales(layer, plan.layers[index])
                for name, tensor in _kept(layer, plan.layers[index]):
                    # What belonged to a removed sublayer has no place in the form.
                    new = f"model.layers.{form.layers.get(index)}.{name}"
                    if new in form.state:
                        out.write(new, tensor)

    save_checkpoint(target, source.tokenizer, directory, write)
    processes.wait()


@torch.no_grad()
def _refitted(
    source: StreamedModel, plan: Plan, calibration: Calibration | None
) -> Iterator[tuple[int, nn.Module]]:
    """The layers of ``source`` in turn, refitted for ``plan`` where there is a ``calibration``."""
    prefix = None if calibration is None else Prefix(calibration, random=True)
    for index, layer in source.walk("surgery"):
        if prefix is not None:
            refit_layer(prefix, plan.layers[index])
        yield index, layer


def _kept(layer: nn.Module, plan: LayerPlan) -> Iterator[tuple[str, Tensor]]:
    """The parameters of ``layer`` by name, cut to the units that ``plan`` keeps, one at a time."""
    owners = {
        name: (slices, plan.kept[sublayer.kind])
        for sublayer in sublayers(layer)
        for name, slices in sublayer.owned.items()
    }
    for name, parameter in layer.named_parameters():
        tensor = parameter.detach()
        yield name, cut_parameter(tensor, *owners[name]) if name in owners else tensor
