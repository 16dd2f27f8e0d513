import copy
import math

import pytest
import torch

from fastprune.kernels import AdamW, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 111), (576,), (70_000,), (5, 7, 9)]
LR = 1e-3


def parameters(dtype, device, shapes=SHAPES):
    return [torch.nn.Parameter((0.1 * torch.randn(s)).to(dtype).to(device)) for s in shapes]


def give_gradients(params, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype).to(p.device)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def snapshot(optimizer, params):
    """Weights and every tensor of the state."""
    states = [optimizer.state[p] for p in params]
    return [p.detach().clone() for p in params] + [
        s[key].clone() for s in states for key in sorted(s)
    ]


def exact_steps(params, steps, max_norm, decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8):
    """The weights after training in float64 on the same gradients."""
    w = [p.detach().double().clone() for p in params]
    m, v = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    for t in range(1, steps + 1):
        give_gradients(params, t - 1)
        g = [p.grad.double() for p in params]
        norm = math.sqrt(sum(float(x.square().sum()) for x in g))
        clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        for i, x in enumerate(g):
            x = x * clip
            m[i] = beta1 * m[i] + (1 - beta1) * x
            v[i] = beta2 * v[i] + (1 - beta2) * x * x
            update = m[i] / (1 - beta1**t) / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            w[i] = w[i] * (1 - LR * decay) - LR * update
    return w


# ---------------------------------------------------------------------------- the update


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_equals_torch_in_float32(device, max_norm):
    ours, theirs = parameters(torch.float32, device), None
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = AdamW(ours, lr=LR, weight_decay=0.1, max_grad_norm=max_norm)
    peer = torch.optim.AdamW(theirs, lr=LR, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        if max_norm:
            norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            # torch adds the squares in fp32, we in fp64: 1e-6 is its error, not ours
            assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        peer.step()
    for a, b in zip(ours, theirs):
        # A few ulp of a weight of size 0.5, which is 2^-24 times 0.5 each.
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 2.0**-25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_equals_float64(device, dtype, max_norm):
    params = parameters(dtype, device)
    exact = exact_steps(params, 5, max_norm)
    optimizer = AdamW(params, lr=LR, weight_decay=0.1, max_grad_norm=max_norm)
    train(optimizer, params, 5)
    for p, w in zip(params, exact):
        master = optimizer.state[p].get("master", p.detach())
        # fp32 arithmetic: 5 steps of a few ulp of a weight of size up to 0.5
        torch.testing.assert_close(master.double(), w, rtol=0, atol=2e-7)
        assert torch.equal(p.detach(), master.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_small_updates_survive_in_half_precision(device, dtype):
    """At lr 1e-6 no single update moves a weight near 1 to its neighbour."""
    steps = 100
    moved = {}
    for master in ("fp32", "stochastic", "none"):
        p = torch.nn.Parameter(torch.ones(40_000, dtype=dtype, device=device))
        optimizer = AdamW([p], lr=1e-6, weight_decay=0, master=master)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        exact = optimizer.state[p].get("master", p.detach().float())
        moved[master] = float(1 - exact.double().mean())
    assert moved["none"] == 0
    # Each step moves by 1e-6; fp32 near 1 resolves 6e-8 per step.
    assert moved["fp32"] == pytest.approx(steps * 1e-6, rel=0.03)
    # Stochastic: 40000 weights, each a random walk. The standard error of the mean is below
    # sqrt(1e-4 * gap / 40000) = 4e-6 with bf16's gap of 2^-8 below 1; four of those.
    assert moved["stochastic"] == pytest.approx(steps * 1e-6, abs=1.6e-5)


def test_float16_stays_healthy_where_torch_breaks(device):
    ours, theirs = parameters(torch.float16, device), None
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for optimizer, params in [
        (torch.optim.AdamW(theirs, lr=1e-5), theirs),
        (AdamW(ours, lr=1e-5), ours),
    ]:
        give_gradients(params, scale=1e-4)  # squares of 1e-8 underflow in fp16
        params[0].grad.zero_()
        optimizer.step()
    assert not all(p.isfinite().all() for p in theirs)
    assert all(p.isfinite().all() for p in ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", ["fp32", "stochastic", "none"])
def test_matches_reference(device, monkeypatch, dtype, master):
    """The plain-torch definition makes the same random draws and the same decisions."""
    options = {"lr": LR, "max_grad_norm": 1.0, "master": master, "seed": 2**40 + 7}
    ours = parameters(dtype, device)
    plain = copy.deepcopy(ours)
    optimizer, oracle = AdamW(ours, **options), AdamW(plain, **options)
    for step in range(3):
        train(optimizer, ours, 1, step)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "compiled", lambda device: None)
            train(oracle, plain, 1, step)
    # One ulp of the half type where fp32 differs in the last bit next to a rounding boundary; the
    # ulp of where the weight was then, up to 3 steps of lr away. In fp32 each of the 3 steps may
    # differ by an ulp: whether torch's own loops fuse a multiplication depends on the processor.
    ulp = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    different = total = 0
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=ulp, atol=3 * LR * ulp)
        different += int((a != b).sum())
        total += a.numel()
    if dtype != torch.float32:
        # fp32 results agree to 2^-22 or so, hence other roundings are rarer than 2^-22 / 2^-11.
        assert different <= 1e-3 * total


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_is_unbiased(dtype):
    x = torch.tensor([1.0 + 2.0**-12, -0.3, 1e-6, 3e-8, -7e-5, 0.0, 0.5], dtype=torch.float32)
    n = 20_000
    wide = x.repeat_interleave(n)
    rounded = reference.stochastic_round(wide, dtype, 3, torch.tensor(1), 0).float().view(-1, n)
    gap = (rounded.max(1).values - rounded.min(1).values).clamp(min=1e-45)
    exact = rounded[:, 0] == x
    # A Bernoulli mean over n draws has a standard error of at most gap / (2 sqrt(n)); five of them.
    error = (rounded.double().mean(1) - x.double()).abs()
    assert (error <= 5 * gap / (2 * math.sqrt(n))).logical_or(exact).all()
    assert (gap <= x.abs() * 2.0**-7 + 2.0**-24).all()


# ---------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_gradients_change_nothing(device, dtype, value):
    params = parameters(dtype, device)
    names = [f"layer.{i}" for i in range(len(params))]
    optimizer = AdamW(zip(names, params), lr=LR, max_grad_norm=1.0)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    give_gradients(params, 9)
    params[3].grad[69_999] = value
    params[1].grad[1, 5:8] = value
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, params)))
    assert int(optimizer.skipped_steps) == 1
    assert optimizer.culprits() == {"layer.1": 3, "layer.3": 1}
    train(optimizer, params, 1)
    assert int(optimizer.skipped_steps) == 1
    assert optimizer.culprits() == {}
    assert [int(optimizer.state[p]["step"]) for p in params] == [3] * len(params)


def test_squares_beyond_float32_are_skipped_too(device):
    p = torch.nn.Parameter(torch.ones(10, device=device))
    optimizer = AdamW([p], lr=LR)
    p.grad = torch.full_like(p, 1e30)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(10, device=device))
    assert optimizer.culprits() == {"group 0, parameter 0": 0}


def test_dynamic_loss_scale(device):
    p = torch.nn.Parameter(torch.ones(10, dtype=torch.float16, device=device))
    optimizer = AdamW([p], lr=LR, loss_scale="dynamic")
    assert float(optimizer.scale(torch.ones((), device=device))) == 65536
    p.grad = torch.full_like(p, float("inf"))
    optimizer.step()
    assert float(optimizer.loss_scale) == 32768
    for _ in range(2000):
        p.grad = torch.full_like(p, 1.0)
        optimizer.step()
    assert float(optimizer.loss_scale) == 65536
    assert int(optimizer.skipped_steps) == 1


def test_loss_scale_is_taken_out(device):
    plain, scaled = (parameters(torch.float32, device, [(50,)]) for _ in range(2))
    scaled[0].data.copy_(plain[0].data)
    one, other = (
        AdamW(plain, lr=LR, max_grad_norm=1.0),
        AdamW(scaled, lr=LR, max_grad_norm=1.0, loss_scale=1024.0),
    )
    (plain[0].square().sum()).backward()
    other.scale(scaled[0].square().sum()).backward()
    one.step()
    other.step()
    assert torch.equal(plain[0], scaled[0])  # a power of two scales exactly
    assert float(other.grad_norm) == float(one.grad_norm)


# ---------------------------------------------------------------------------- the optimizer class


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", ["fp32", "stochastic", "none"])
def test_resume_is_bitwise(device, tmp_path, dtype, master):
    options = {"lr": LR, "max_grad_norm": 1.0, "master": master, "seed": 5}
    params = parameters(dtype, device)
    optimizer = AdamW(params, **options)
    train(optimizer, params, 3)
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, tmp_path / "state.pt")
    train(optimizer, params, 3, first=3)

    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = AdamW(saved["params"], **(options | {"seed": 0}))
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, saved["params"], 3, first=3)
    for a, b in zip(snapshot(optimizer, params), snapshot(resumed, saved["params"])):
        assert torch.equal(a, b)


def test_skips_and_loss_scale_survive_resume(device):
    params = parameters(torch.float16, device)
    optimizer = AdamW(params, loss_scale="dynamic")
    give_gradients(params)
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    resumed = AdamW(params, loss_scale="dynamic")
    resumed.load_state_dict(optimizer.state_dict())
    assert int(resumed.skipped_steps) == 1
    assert float(resumed.loss_scale) == 32768


def test_state_of_torch_adamw_is_accepted(device):
    ours = parameters(torch.float32, device)
    theirs = copy.deepcopy(ours)
    peer = torch.optim.AdamW(theirs, lr=LR)
    train(peer, theirs, 3)
    with torch.no_grad():
        for a, b in zip(ours, theirs):
            a.copy_(b)
    optimizer = AdamW(ours, lr=LR)
    optimizer.load_state_dict(peer.state_dict())
    train(optimizer, ours, 2, first=3)
    train(peer, theirs, 2, first=3)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 2.0**-25)  # a few ulp, as above


def test_copies_are_independent(device):
    params = parameters(torch.float32, device)
    optimizer = AdamW(params, lr=LR)
    train(optimizer, params, 2)
    pair, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params, 2, first=2)
    train(twin, pair, 2, first=2)
    for a, b in zip(snapshot(optimizer, params), snapshot(twin, pair)):
        assert torch.equal(a, b)


def test_groups_schedules_and_closure(device):
    ours = parameters(torch.float32, device)
    theirs = copy.deepcopy(ours)

    def groups(params):
        return [
            {"params": params[:2], "lr": 1e-2, "betas": (0.8, 0.9)},
            {"params": params[2:], "weight_decay": 0.5, "eps": 1e-3},
        ]

    results = []
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(groups(params), lr=LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * 2.0**-25)  # lr 1e-2: larger updates


def test_parameters_may_join_late(device):
    """A parameter frozen at first, and a group added later, count their own steps."""
    ours = parameters(torch.float32, device)
    theirs = copy.deepcopy(ours)
    optimizer, peer = AdamW(ours[:3], lr=LR), torch.optim.AdamW(theirs[:3], lr=LR)
    for step in range(6):
        if step == 3:
            for o, params in ((optimizer, ours), (peer, theirs)):
                o.add_param_group({"params": params[3:], "lr": 1e-4})
        for o, params in ((optimizer, ours), (peer, theirs)):
            give_gradients(params, step)
            if step < 2:
                params[1].grad = None
            o.step()
    assert [int(optimizer.state[p]["step"]) for p in ours] == [6, 4, 6, 3, 3]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 2.0**-25)  # a few ulp


def test_layouts(device):
    """Transposed weights, and gradients laid out in another way than the weights."""
    transposed = torch.randn(30, 20, device=device).t()
    images = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    ours = [torch.nn.Parameter(transposed), torch.nn.Parameter(images)]
    theirs = copy.deepcopy(ours)
    for kind, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params, lr=LR)
        for step in range(2):
            give_gradients(params, step)
            for p in params:
                p.grad = p.grad.contiguous()
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=2.0**-22)  # an ulp of weights up to 4


def test_shards_share_one_norm(device):
    """What FSDP2 does: each process holds a part, and the totals are added between the passes."""
    whole = parameters(torch.float32, device)
    parts = copy.deepcopy(whole)
    together = AdamW(whole, lr=LR, max_grad_norm=1.0)
    totals = []
    shards = [parts[:2], parts[2:]]
    optimizers = [
        AdamW(shard, lr=LR, max_grad_norm=1.0, reduce_total=lambda t: t.copy_(sum(totals)))
        for shard in shards
    ]
    for step in range(3):
        give_gradients(whole, step)
        give_gradients(parts, step)
        together.step()
        totals[:] = [
            torch.stack([sum(p.grad.double().square().sum() for p in shard), 0 * t])
            for shard, t in zip(shards, [torch.zeros((), dtype=torch.float64, device=device)] * 2)
        ]
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(whole, parts):
        # The clip factors agree to fp32 rounding of the sums of squares.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_versions_rise(device):
    params = parameters(torch.float32, device)
    before = [p._version for p in params]
    train(AdamW(params), params, 1)
    assert all(p._version > v for p, v in zip(params, before))


def test_empty_parameters(device):
    params = parameters(torch.float32, device, [(0,), (4,), (0, 5)])
    optimizer = AdamW(params)
    train(optimizer, params, 1)
    optimizer.zero_grad()
    optimizer.step()
    assert int(optimizer.state[params[1]]["step"]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", ["fp32", "stochastic", "none"])
def test_same_bits_in_every_way(same_bits, dtype, master):
    start = parameters(dtype, "cpu", [(3,), (333, 333), (40_000,)])

    def run():
        params = copy.deepcopy(start)
        optimizer = AdamW(params, lr=LR, max_grad_norm=1.0, master=master)
        train(optimizer, params, 2)
        return snapshot(optimizer, params)

    same_bits(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master": "fp16"}, "master is 'fp16'"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
        ({"loss_scale": "auto"}, "loss_scale is 'auto'"),
        ({"loss_scale": -2.0}, "loss_scale must be positive"),
        ({"lr": -1.0}, "lr of group 0 is out of range"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] of group 0 is out of range"),
        ({"eps": -1.0}, "eps of group 0"),
        ({"weight_decay": -1.0}, "weight_decay of group 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([torch.nn.Parameter(torch.ones(3))], **options)


def test_parameters_are_checked(module):
    with pytest.raises(ValueError, match="float64"):
        AdamW([torch.nn.Parameter(torch.ones(3, dtype=torch.float64))])
    optimizer = AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3).double())]})
    assert len(optimizer.param_groups) == 1
