"""What a pruning run is refused for before weights are read or anything is measured.

Sizes are enough to tell whether layers, limits, alignment, plan and budget go together; they stand
in the headers of the weight files.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastprune.data.records import SELF, source_names
from fastprune.data.text import check_text
from fastprune.models.families import block_parameters, decoder_layers, family_of, geometries
from fastprune.models.streamed import outline
from fastprune.pruning.allocation import layer_weights
from fastprune.pruning.budget import Budget, budget_of, layer_sizes, limits_of
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.effort import decided
from fastprune.pruning.mixtures import check_mixture
from fastprune.pruning.plan import Plan
from fastprune.pruning.sensitivity import MEASURED, load_layer_importance
from fastprune.pruning.sizes import BudgetError, check_align, check_reachable
from fastprune.pruning.texts import with_lengths


def check_early(config: PruneConfig) -> None:
    """InputError for what the texts, the plan and the sizes in the files of the model rule out.

    A model whose sizes cannot be told from its files is left to what loads it.
    """
    for name in (*source_names(config.calib), *source_names(config.eval)):
        if name != SELF:
            check_text(name)
    plan = Plan.load(config.plan) if config.plan else None
    model = outline(config.model, config.family)
    if model is None:
        return
    family_of(model)
    check_mixture(model, config)
    config = with_lengths(config, model)
    config.selected_layers(len(decoder_layers(model)))
    if plan is not None:
        plan.check_model(geometries(model))
    elif config.target_latency is None and config.vocab is None:  # which only the work tells
        budget = budget_of(config, model, None)
        assert budget is not None  # config.check() has seen one
        check_settled(decided(config, model, budget.need / block_parameters(model)), model, budget)


def check_settled(config: PruneConfig, model: nn.Module, budget: Budget) -> None:
    """InputError where ``config``, in which nothing is left open, cannot meet ``budget``.

    Of ``model`` only sizes are looked at. A budget of time is not: its costs are not linear.
    """
    sizes, limits = layer_sizes(model, config), limits_of(config)
    check_align(sizes, limits)
    file = Path(config.layer_importance)
    if config.allocation not in ("inverse", "proportional") or config.layer_importance in MEASURED:
        pass
    elif file.exists() or not config.dry_run:  # which may come before the file is made
        assert config.alpha is not None  # decided by `effort`
        given = load_layer_importance(file, len(sizes))
        layer_weights(given, config.allocation, config.alpha)
    if budget.table is not None or budget.at_least:
        return
    budget.check_removes(model, config)
    try:
        check_reachable(sizes, round(budget.need), limits)
    except BudgetError as error:
        raise budget.unreachable(error, model, config) from error
