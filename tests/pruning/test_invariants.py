"""What holds for any model and plan: masking, identity, refits, threads, half precision."""

from __future__ import annotations

import pytest
import torch
from counting import keeping
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer, token_ids
from torch import nn

from fastprune import cli
from fastprune.distributed import ALONE
from fastprune.kernels import backend
from fastprune.models.families import geometries
from fastprune.models.layers import Layers
from fastprune.models.load import load_model
from fastprune.pruning.compensation import refit
from fastprune.pruning.masking import mask
from fastprune.pruning.moments import Moments
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.surgery import apply_plan

HALVES = ("bfloat16", "float16")


def run(*words) -> None:
    assert cli.main([*map(str, words), "--quiet", "--device", "cpu"]) == 0, words


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


def checkpoint(folder, dtype: str) -> None:
    tiny_model("llama", layers=2).to(getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def calibrated(text) -> list:
    """Flags of prune: little text to calibrate and to measure on."""
    measured = ["--eval", text, "--eval-seq-len", 32, "--eval-windows", 2, "--keep-worse"]
    return ["--calib", text, "--calib-samples", 8, "--calib-seq-len", 32, *measured]


# ---------------------------------------------------------------------------- surgery


@st.composite
def plans(draw, family: str) -> Plan:
    """A random plan: every layer keeps any groups and channels, perhaps none of a sublayer."""
    sizes = tuple(geometries(tiny_model(family)))
    groups = st.sets(st.integers(0, 3))
    channels = st.sets(st.integers(0, 95), max_size=96)
    kept = [(sorted(draw(groups)), sorted(draw(channels))) for _ in sizes]
    return Plan(sizes, tuple(keeping(i, g, c) for i, (g, c) in enumerate(kept)))


@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
@settings(max_examples=4)
def test_any_plan_computes_what_its_mask_does(family, data) -> None:
    plan = data.draw(plans(family))
    shown, cut = tiny_model(family), tiny_model(family)
    mask(Layers(shown), plan, None)
    apply_plan(cut, plan)
    ids = token_ids(1, 9, seed=3)
    with torch.no_grad():
        expected, got = (m(input_ids=ids, use_cache=False).logits for m in (shown, cut))
    # only the order of summation differs; logits are of order 10, fp32 has 1e-7 of that
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_keeps_everything_changes_no_bit(family) -> None:
    model, dense = tiny_model(family), tiny_model(family)
    apply_plan(model, keep_all(geometries(model)))
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["resident", "stream"])
def test_a_checkpoint_by_such_a_plan_has_the_same_bytes(tmp_path, text, dtype, stream) -> None:
    dense, out, plan = tmp_path / "dense", tmp_path / "out", tmp_path / "plan.json"
    checkpoint(dense, dtype)
    model, _ = load_model(dense)
    keep_all(geometries(model)).save(plan)
    run("prune", dense, "--plan", plan, "--out", out, *stream, *calibrated(text))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, dense))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


# ---------------------------------------------------------------------------- compensation


def moments(linear: nn.Linear, x: torch.Tensor, lacking: torch.Tensor | None) -> Moments:
    found = Moments(linear, targets=lacking is not None)
    found.add(x, None if lacking is None else x @ linear.weight.float().T + lacking)
    found.complete(ALONE)
    return found


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=25)
def test_a_refit_makes_no_error_worse(seed, dtype) -> None:
    """The squared output error on held-out tokens, computed anew from what is written, is at most
    that of plain removal, however few the tokens and whatever their correlations."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns, tokens = (int(torch.randint(2, n, (), generator=draw)) for n in (12, 24, 60))
    linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
    linear.weight.data = torch.randn(rows, columns, generator=draw).to(dtype)
    mixing = torch.randn(columns, columns, generator=draw)
    fit_x, test_x = (torch.randn(tokens, columns, generator=draw) @ mixing for _ in range(2))
    kept = torch.randperm(columns, generator=draw)[: columns // 2 + 1].sort().values
    solution = refit(linear, kept, moments(linear, fit_x, None), moments(linear, test_x, None))
    assert solution.error_after <= solution.error_before
    removed = torch.ones(columns, dtype=torch.bool)
    removed[kept] = False
    before = linear.weight.detach().double()
    plain = before.clone()
    plain[:, removed] = 0
    with torch.no_grad():
        solution.write(linear)
    after, x = linear.weight.detach().double(), test_x.double()
    assert not bool(after[:, removed].any())
    wanted = x @ before.T
    errors = [float((x @ w.T - wanted).square().sum()) for w in (plain, after)]
    # the moments are sums in fp32, in which errors are compared
    assert errors[1] <= errors[0] * (1 + 1e-4) + 1e-5 * float(wanted.square().sum())
    if solution.strength is None:
        assert torch.equal(after, plain)


# ---------------------------------------------------------------------------- threads and levels


def test_a_run_by_kernels_alone_is_the_same_on_any_threads_and_levels(tmp_path, text) -> None:
    """Scores and cuts are the kernels' own. What torch multiplies depends on the threads."""
    module = backend.compiled(torch.device("cpu"))
    if module is None:
        pytest.skip("no compiled kernels")
    tiny_checkpoint(tmp_path / "dense", layers=2)
    level, threads = module.cpu_level(), torch.get_num_threads()
    ways = [(name, 1) for name in module.cpu_levels()] + [(level, 2), (level, 3)]
    written = {}
    try:
        for name, count in ways:
            module.set_cpu_level(name)
            out = tmp_path / f"{name}-{count}"
            flags = ["--importance", "magnitude-l2", "--allocation", "global", "--ratio", 0.3]
            flags += ["--compensate", "none", "--threads", count, *calibrated(text)]
            run("prune", tmp_path / "dense", "--out", out, *flags)
            files = ("model.safetensors", "fastprune/plan.json")
            written[name, count] = [(out / file).read_bytes() for file in files]
    finally:
        module.set_cpu_level(level)
        torch.set_num_threads(threads)
    first, *others = written.values()
    assert all(other == first for other in others)


# ---------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_model_goes_through_the_commands(tmp_path, text, dtype) -> None:
    dense, small, tuned, adapter, merged, out = (
        tmp_path / name for name in ("dense", "small", "tuned", "adapter", "merged", "out")
    )
    checkpoint(dense, dtype)
    run("prune", dense, "--out", small, "--ratio", 0.2, *calibrated(text))
    learnt = ["--data", text, "--seq-len", 32, "--batch-size", 2, "--max-steps", 2]
    learnt += ["--eval", text, "--eval-seq-len", 32, "--eval-windows", 2, "--keep-worse"]
    run("finetune", small, "--out", tuned, *learnt)
    run("finetune", small, "--out", adapter, "--method", "lora", *learnt)
    run("merge", small, "--adapter", adapter, "--out", merged)
    run("export", merged, "--format", "hf", "--out", out)
    for folder in (small, tuned, merged, out):
        model, _ = load_model(folder)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == getattr(torch, dtype), (folder.name, name)
            assert bool(parameter.isfinite().all()), (folder.name, name)
    before, after = (load_file(f / "model.safetensors") for f in (small, tuned))
    assert any(not torch.equal(before[name], after[name]) for name in before)
