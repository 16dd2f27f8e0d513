"""Pruning in steps: a part of the budget, what stays refitted, scored anew, and so on.

The model is masked, not cut, between two steps, and whole again at the end. The result of all steps
is one plan for the model as it was, so a plan is all that is needed to repeat the run.
"""

from __future__ import annotations

import logging

from fastprune import distributed
from fastprune.pruning.budget import Budget
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.plan import Plan
from fastprune.pruning.planning import Planned, make_plan
from fastprune.report.run import Clock

log = logging.getLogger("fastprune")


def plan_in_steps(
    calibration: Calibration, budget: Budget, config: PruneConfig, clock: Clock
) -> Planned:
    """What `make_plan` gives, reached in ``config.iterations`` equal parts of ``budget``.

    Each step plans for its whole part of the budget with what went before ranked lowest; the
    masked weights are always made from the dense ones, so refits do not add up their errors. All
    processes go by the plan of the first one.
    """
    layers = calibration.layers
    budget.check_removes(layers.model, config)
    steps = config.iterations
    if steps == 1:
        return distributed.from_first(make_plan(calibration, budget, config, clock))
    refit = None if config.compensate == "none" else calibration
    plan: Plan | None = None
    with preserved(layers) as dense:
        for step in range(1, steps):
            part = budget.part(step / steps)
            made = make_plan(calibration, part, config, clock, gone=plan)
            plan = distributed.from_first(made).plan
            dense.restore()
            with clock("compensate"):
                mask(layers, plan, refit)
            log.info("step %d of %d is planned", step, steps)
        made = make_plan(calibration, budget, config, clock, gone=plan)
        # the last step's divergence is the one from the model as masked before it
        return distributed.from_first(made)._replace(divergence=None)
