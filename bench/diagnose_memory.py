"""A checkpoint of several GB, scanned by `fastprune diagnose --no-forward` in 1 GB of memory.

    python bench/diagnose_memory.py [--folder DIR] [--gb 6] [--limit 1.0] [--threads 1]

Writes random bf16 weights (once, kept in the folder), one matrix of them larger than the limit, and
one NaN into the very last layer. Prints seconds and the process's peak resident memory, with torch
and all code in it. Exits 1 when the peak is above the limit or the NaN is not found.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

GB = 10**9
HIDDEN, CHANNELS, VOCABULARY = 4096, 14336, 180_000  # an embedding of 1.47 GB
LAYER_BYTES = 2 * (3 * HIDDEN * CHANNELS + 2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + 2 * HIDDEN)


def make(folder: Path, layers: int) -> None:
    """Write the random checkpoint through files of 2 GB."""
    import torch
    from torch import Tensor

    from fastprune.models.shards import ShardWriter

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    layout = {"model.embed_tokens.weight": empty(VOCABULARY, HIDDEN)}
    for index in range(layers):
        name = f"model.layers.{index}"
        for projection, rows in (("q", HIDDEN), ("k", 1024), ("v", 1024)):
            layout[f"{name}.self_attn.{projection}_proj.weight"] = empty(rows, HIDDEN)
        layout[f"{name}.self_attn.o_proj.weight"] = empty(HIDDEN, HIDDEN)
        for projection in ("gate", "up"):
            layout[f"{name}.mlp.{projection}_proj.weight"] = empty(CHANNELS, HIDDEN)
        layout[f"{name}.mlp.down_proj.weight"] = empty(HIDDEN, CHANNELS)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layout[f"{name}.{norm}.weight"] = empty(HIDDEN)
    folder.mkdir(parents=True)
    last = f"model.layers.{layers - 1}.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    # Random once: what is timed and weighed does not depend on the values.
    pool = torch.randn(2**24, generator=generator).mul_(0.02).to(torch.bfloat16)
    with ShardWriter(folder, layout, max_bytes=2 * GB) as out:
        for name, tensor in layout.items():
            copies = -(-tensor.numel() // pool.numel())
            values = pool.repeat(copies)[: tensor.numel()].view(tensor.shape)
            if name == last:
                values[-1, -1] = math.nan
            out.write(name, values)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/diagnose-memory"))
    parser.add_argument("--gb", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--limit", type=float, default=1.0, help="GB of resident memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--make", action="store_true", help="make the checkpoint and stop")
    options = parser.parse_args()
    layers = max(1, round((options.gb * GB - 2 * VOCABULARY * HIDDEN) / LAYER_BYTES))
    if options.make:
        make(options.folder, layers)
        return 0
    if not (options.folder / "config.json").is_file():
        # In a process of its own: a child's peak starts from what its parent holds.
        again = [sys.executable, __file__, "--make", "--folder", str(options.folder)]
        subprocess.run([*again, "--gb", str(options.gb)], check=True)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))

    record = options.folder / "result.json"
    command = [sys.executable, "-m", "fastprune", "diagnose", str(options.folder), "--no-forward"]
    command += ["--quiet", "--json", str(record), "--threads", str(options.threads)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 4:
        print(f"exit status {done.returncode}: {done.stderr.strip()}")
        return 1
    result = json.loads(record.read_text())
    peak, scan = result["peak_memory_bytes"], result["seconds"]["scan"]
    largest = max(math.prod(tensor["shape"]) for tensor in result["tensors"]) * 2
    print(f"{size / GB:.2f} GB of weights, the largest matrix {largest / GB:.2f} GB")
    print(f"{seconds:.1f} s, {scan:.1f} s of it the scan ({size / scan / GB:.1f} GB/s)")
    print(f"peak resident {peak / GB:.2f} GB; limit {options.limit:.2f} GB")
    print(f"found: {result['findings'][0]['what']}")
    found = result["values"]["nan"] == 1
    return 0 if found and peak <= options.limit * GB else 1


if __name__ == "__main__":
    sys.exit(main())
