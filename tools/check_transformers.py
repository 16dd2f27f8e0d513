"""Do the checkpoints that fastprune writes give the same logits in other releases of transformers?

    python tools/check_transformers.py [--work DIR] [VERSION ...]

Tiny models, dense and pruned, are written by the installed release; each VERSION (default: 4.57.6
5.15.0 5.20.0 and the installed one) is fetched with pip into a folder of its own, reads every
checkpoint in a fresh process, without fastprune, and compares logits, token ids, the model without
its head, and what is generated with and without a KV cache. Per-layer checkpoints need transformers
5.15, which knows `per_layer_config`. Prints a table; exits 1 on any difference. Needs the package
index.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("4.57.6", "5.15.0", "5.20.0", "installed")
# What each release wants beside it that a newer installation may not have.
BESIDE = {
    "4": ["huggingface_hub==0.36.0", "tokenizers==0.22.1"],
    "5.15": ["huggingface_hub==1.5.0", "tokenizers==0.22.1", "httpx", "httpcore", "h11", "anyio",
             "certifi", "sniffio", "idna"],
}  # fmt: skip
TOLERANCE = 1e-4

READ = """
import json, sys
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    try:
        expected = torch.load(folder + "/expected.pt")
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, attn_implementation="eager")
        with torch.no_grad():
            logits = model(expected["ids"]).logits.float()
            bare = AutoModel.from_pretrained(
                folder, trust_remote_code=True, attn_implementation="eager")
            hidden = bare(expected["ids"]).last_hidden_state
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        written = [
            model.generate(expected["ids"], use_cache=cache, **options) for cache in (True, False)]
        error = ((logits - expected["logits"]).norm() / expected["logits"].norm()).item()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        same = tokenizer(expected["text"])["input_ids"] == expected["tokens"]
        found[folder] = (
            "other token ids" if not same
            else "other text with a cache" if not torch.equal(*written)
            else "other hidden states" if not torch.equal(model.lm_head(hidden), logits)
            else error)
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
print("RESULT" + json.dumps(found))
"""


def main() -> int:
    """Write the checkpoints, read them everywhere, print the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--work", type=Path, help="keep checkpoints and releases here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        folders = write_checkpoints(work / "checkpoints")
        wrong = 0
        for version in args.versions:
            found = read_with(fetch(version, work), folders)
            print(f"transformers {found.pop('version')}")
            for folder, value in found.items():
                name = Path(folder).name
                old = version.startswith("4") and name.startswith("per-layer")
                bad = not (isinstance(value, float) and value <= TOLERANCE)
                wrong += bad and not old
                note = " (needs 5.15)" if bad and old else " DIFFERS" if bad else ""
                print(f"  {name:32} {value if isinstance(value, str) else f'{value:.1e}'}{note}")
    return 1 if wrong else 0


def write_checkpoints(root: Path) -> list[str]:
    """Checkpoints of every family and rope, uniform and per layer, with the logits they must give.

    Folders are overwritten.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from cutting import cut
    from tiny import FAMILIES, TEXT, tiny_model, tiny_tokenizer, token_ids

    from fastprune.models.checkpoint import save_checkpoint

    factors = {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
    scaled = {"factor": 4.0, "original_max_position_embeddings": 64}
    ropes = {
        "default": {},
        "linear": {"factor": 4.0},
        "yarn": scaled,
        "llama3": scaled | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": scaled | factors,
    }
    shapes = {
        "uniform": [(6, 3, 48)] * 4,
        "per-layer": [(0, 0, 50), (8, 4, 96), (6, 3, 70), (2, 1, 0)],
    }
    folders = []
    for family in FAMILIES:
        for kind, values in ropes.items():
            for shape, sizes in shapes.items():
                rope = {"rope_type": kind, "rope_theta": 5e5, **values}
                model = cut(
                    tiny_model(family, rope_parameters=rope, max_position_embeddings=256), sizes
                )
                folder = root / f"{shape}-{family}-{kind}"
                folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(model, tiny_tokenizer(), folder)
                ids = token_ids(1, 48)
                with torch.no_grad():
                    logits = model(ids).logits
                tokens = tiny_tokenizer()(TEXT)["input_ids"]
                content = {"ids": ids, "logits": logits, "text": TEXT, "tokens": tokens}
                torch.save(content, folder / "expected.pt")
                folders.append(str(folder))
    return folders


def fetch(version: str, work: Path) -> str:
    """The folder to put first on the path for `version`; empty for the installed release."""
    if version == "installed":
        return ""
    target = work / f"transformers-{version}"
    if not target.is_dir():
        beside = next((needs for key, needs in BESIDE.items() if version.startswith(key)), [])
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*pip, "--target", str(target), f"transformers=={version}", *beside]
        subprocess.run(command, check=True)
    return str(target)


def read_with(path: str, folders: list[str]) -> dict[str, float | str]:
    """What a fresh process with `path` first on its module path finds of each folder."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("RESULT"))


if __name__ == "__main__":
    sys.exit(main())
