"""Score, plan and cut a model of the shape of Llama-3-8B with random bf16 weights on a GPU.

    python bench/gpu_prune.py [--layers 32] [--json FILE]

The aim for the whole model on one H200: at most 10 s after loading, with 10 calibration windows of
128 tokens, at a peak of at most 1.25 times the weights. Exits 1 when either is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastprune.models.families import block_parameters
from fastprune.models.layers import Layers
from fastprune.pruning.budget import Budget
from fastprune.pruning.calibration import Calibration
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.effort import decided
from fastprune.pruning.planning import Request, make_plan
from fastprune.pruning.surgery import apply_plan
from fastprune.report.run import Clock

MOST_SECONDS = 10.0
MOST_MEMORY = 1.25  # times the weights
RATIO = 0.25


def random_model(layers: int) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(options.layers)
    weights = sum(p.nbytes for p in model.parameters())
    before = block_parameters(model)
    windows = torch.randint(model.config.vocab_size, (10, 128))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    clock = Clock()
    plain = {"structures": ("attention", "mlp"), "allocation": "uniform", "compensate": "none"}
    config = PruneConfig(ratio=RATIO, importance="taylor-first", align=1, layers="all", **plain)
    config = decided(config, model, RATIO)
    calibration = Calibration(Layers(model), windows)
    budget = Budget("ratio", RATIO, round(RATIO * before))
    plan = make_plan(Request(calibration, budget, config), clock).plan
    with clock("surgery"):
        apply_plan(model, plan)
        torch.cuda.synchronize()
    seconds = clock.totals()
    peak = torch.cuda.max_memory_allocated()
    with torch.no_grad():
        logits = model(windows[:1].cuda()).logits
    met = seconds["total"] <= MOST_SECONDS and peak <= MOST_MEMORY * weights
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": options.layers,
        "weight_bytes": weights,
        "peak_bytes": peak,
        "peak_over_weights": peak / weights,
        "seconds": seconds,
        "ratio": {"requested": RATIO, "achieved": 1 - block_parameters(model) / before},
        "finite_logits": bool(logits.isfinite().all()),
        "met": met,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if met and result["finite_logits"] else 1


if __name__ == "__main__":
    sys.exit(main())
