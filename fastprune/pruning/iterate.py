"""Pruning in steps: a part of the budget, what stays refitted, scored anew, and so on.

The model is masked, not cut, between two steps, and dense again at the end. The result of all steps
is one plan for the model as it was, so a plan is all that is needed to repeat the run.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.planning import Planned, Request, make_plan
from fastprune.report.run import Clock

log = logging.getLogger("fastprune")


def plan_in_steps(request: Request, clock: Clock) -> Planned:
    """What `make_plan` gives, reached in ``config.iterations`` equal parts of the budget.

    Each step plans for all of the budget up to it, with what went before ranked lowest; the
    masked weights are always made from the dense ones, so refits do not add up their errors. All
    processes go by the plan of the first one.
    """
    layers, budget = request.calibration.layers, request.budget
    processes = request.calibration.processes
    budget.check_removes(request.model, request.config)
    steps = request.config.iterations
    if steps == 1:
        return processes.from_first(make_plan(request, clock))
    with preserved(layers) as dense:
        for step in range(1, steps):
            made = make_plan(replace(request, budget=budget.part(step / steps)), clock)
            plan = processes.from_first(made).plan
            dense.restore()
            with clock("compensate"):
                mask(layers, plan, request.refit)
            request = replace(request, gone=plan)
            log.info("step %d of %d is planned", step, steps)
        made = make_plan(request, clock)
        # the last step's divergence is the one from the model as masked before it
        return processes.from_first(made)._replace(divergence=None)
