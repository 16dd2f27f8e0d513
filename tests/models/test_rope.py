"""Every kind of rotary embedding survives pruning and saving, beyond the original context too.

Every kind meets every family and every shape, and every family every shape, not all three at once.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import cut
from tiny import FAMILIES, tiny_model, tiny_tokenizer, token_ids

from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.load import load_model
from fastprune.models.readback import check_read_back

ORIGINAL = 64
LONG = 200
SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": SCALED,
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}
SHAPES = {
    "per-layer": [(6, 3, 50), (8, 4, 96), (8, 4, 70), (2, 1, 32)],
    "uniform": [(6, 3, 48)] * 4,
    "sublayers removed": [(0, 0, 96), (8, 4, 96), (8, 4, 0), (8, 4, 96)],
    "a layer removed": [(4, 2, 48), (0, 0, 0), (4, 2, 48), (4, 2, 48)],
}


PAIRS = [
    (family, kind, list(SHAPES)[(i + j) % len(SHAPES)])
    for i, kind in enumerate(ROPES)
    for j, family in enumerate(FAMILIES)
]


@pytest.mark.parametrize(("family", "kind", "shape"), PAIRS)
def test_logits_are_those_of_the_model_in_memory(
    family: str, kind: str, shape: str, tmp_path: Path
) -> None:
    rope = {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}
    positions = ORIGINAL if kind == "dynamic" else 4 * ORIGINAL
    model = tiny_model(family, rope_parameters=rope, max_position_embeddings=positions)
    cut(model, SHAPES[shape])
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    check_read_back(model, tmp_path)
    read, _ = load_model(tmp_path)
    for length in (24, LONG, 24):  # dynamic frequencies grow with the context, and go back
        ids = token_ids(1, length)
        with torch.no_grad():
            torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
