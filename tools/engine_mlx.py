"""Does MLX-LM generate from a `nemotron-nas` export what transformers generates from the model?

SmolLM2 pruned with `--layout deci` (channels; whole sublayers) and per layer, filled up with zeros,
each exported in fp32; five prompts are continued greedily, by transformers from the pruned model
and by MLX-LM from the exported folder.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MISSING = 'MLX-LM is not installed: pip install "mlx[cpu]" mlx-lm (wheels for glibc 2.35 or newer)'
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "To make bread you need flour,",
    "The three primary colours are",
    "In the year 1969",
)
TOKENS = 32
RUNS = {
    "channels": {"layout": "deci"},
    "sublayers": {"layout": "deci", "structures": ("sublayer",)},
    "per layer, padded": {"structures": ("attention", "mlp"), "allocation": "global"},
}
# few windows: what is compared is the engine, not the quality
QUICK = {"calib_samples": 8, "calib_seq_len": 128, "sensitivity_samples": 2}
QUICK |= {"eval_windows": 1, "eval_seq_len": 256, "effort": "fast", "keep_worse": True}

# In a process of its own: mlx and torch each bring threads that need not share a process.
GENERATE = """
import json, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
folder, count, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model, tokenizer = load(folder, tokenizer_config={"trust_remote_code": True})
found = []
for ids in prompts:
    steps = generate_step(mx.array(ids), model, max_tokens=count)
    found.append([int(token) for token, _ in steps])
print("RESULT" + json.dumps(found))
"""


def installed() -> bool:
    """Whether MLX-LM is at hand."""
    return importlib.util.find_spec("mlx_lm") is not None


def checks(work: Path) -> Iterator[tuple[str, bool, str]]:
    """Name, whether the texts are equal, and the text; `work` holds what is exported."""
    for name, settings in RUNS.items():
        folder = work / name.replace(",", "").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        model, tokenizer, written = pruned_and_exported(folder, settings)
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        expected = by_transformers(model, prompts)
        found = by_mlx(folder, prompts)
        size = f"{written['bytes']:,} bytes, {written['padding_bytes']:,} of zeros"
        for prompt, own, other in zip(PROMPTS, expected, found, strict=True):
            yield name, own == other, f"{prompt}{tokenizer.decode(other)!r} ({size})"


def pruned_and_exported(folder: Path, settings: dict):
    """SmolLM2 pruned by `settings`, its tokenizer, and what the export into `folder` says."""
    from fastprune.exporting import nemotron
    from fastprune.exporting.config import ExportConfig
    from fastprune.models.load import load_model
    from fastprune.pruning.config import PruneConfig
    from fastprune.pruning.pipeline import prune

    config = PruneConfig(model="smollm2-135m", ratio=0.2, **QUICK, **settings)
    model, tokenizer = load_model(config.model, dtype="float32", device="cpu")
    prune(model, tokenizer, config)
    options = ExportConfig(
        model=config.model, format=("nemotron-nas",), out=folder, pad=config.layout != "deci"
    )
    nemotron.check(model, options)
    return model, tokenizer, nemotron.write(model, tokenizer, folder, options)


def by_transformers(model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations, token ids, of `prompts`."""
    import torch

    found = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        found.append(out[0, len(ids) :].tolist())
    return found


def by_mlx(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The same by MLX-LM from the exported `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder), str(TOKENS), json.dumps(prompts)],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("RESULT"))
