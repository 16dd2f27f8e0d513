"""The moments that a script's optimizer left are where ours begins."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastprune.kernels.optim import AdamW
from fastprune.models.load import STATE_SUFFIXES
from fastprune.models.script_optimizer import Moments, moments_for
from fastprune.models.states import NeedsPickle
from fastprune.progress import log as progress_log


def left_moments(model: nn.Module, source: str) -> Moments:
    """The moments beside the weights in the file `source`; none for a model of any other kind.

    Says what there was, or why it cannot be used.
    """
    path = Path(source).expanduser()
    if not path.is_file() or path.suffix not in STATE_SUFFIXES:
        return {}
    try:
        found = moments_for(model, path)
    except NeedsPickle:
        progress_log.info("%s: what its optimizer left is not read from a pickled file", source)
        return {}
    if found.moments:
        step = max(int(state["step"]) for state in found.moments.values())
        progress_log.info(
            "%s: its optimizer's moments of %d tensors, after %d steps, are where training begins",
            source,
            len(found.moments),
            step,
        )
    else:
        progress_log.info("%s: no moments of an optimizer are used: %s", source, found.reason)
    return found.moments


def take_over(optimizer: AdamW, moments: Moments) -> int:
    """Give `optimizer`, which has not stepped, the `moments` of what it trains; how many it had."""
    state = optimizer.state_dict()
    numbers = {
        name: number
        for group in state["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    state["state"] = {numbers[name]: found for name, found in moments.items() if name in numbers}
    optimizer.load_state_dict(state)
    return len(state["state"])
