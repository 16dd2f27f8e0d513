import pytest
import torch
from torch.nn import functional

from fastprune.kernels import attention as kernel
from fastprune.kernels import reference

# batch, heads, kv heads, n, d: blocks are of 64 positions, products of 4 rows and up to 64 columns,
# or of tiles of 16 by 16
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 1, 63, 64),
    (1, 4, 2, 64, 64),
    (2, 9, 3, 65, 64),
    (1, 2, 2, 200, 128),
    (1, 3, 1, 130, 80),
    (1, 2, 1, 100, 96),
    (3, 4, 4, 31, 112),
    (1, 2, 1, 70, 256),
]
# Half-precision operands leave 2^-9 in each weight and result. Their errors are independent, so
# relative to the norm of a whole result little more than one of them remains.
NORM = 6e-3


@pytest.fixture(params=["v4", "amx"])
def serves(request, module):
    """Each level whose bf16 products this processor has, chosen."""
    before = module.cpu_level()
    if request.param not in module.cpu_levels():
        pytest.skip(f"this processor has no level {request.param}")
    try:
        module.set_cpu_level(request.param)
        if not kernel.attention_serves(torch.device("cpu")):
            pytest.skip(f"this processor has no bf16 products at level {request.param}")
        yield
    finally:
        module.set_cpu_level(before)


def inputs(shape, dtype=torch.bfloat16, spread=1.0):
    batch, heads, kv_heads, n, d = shape
    return [
        torch.randn(batch, n, count, d).mul_(spread).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def distance(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def passes(q, k, v, grad, scale):
    """Output, logarithms of sums, and the gradients of q, k and v."""
    out, log_sums = kernel.attention(q, k, v, scale=scale)
    return [out, log_sums, *kernel.attention_backward(grad, q, k, v, out, log_sums, scale=scale)]


def in_fp64(q, k, v, grad, scale):
    q, k, v, grad = (t.double() for t in (q, k, v, grad))
    out, log_sums = reference.attention(q, k, v, scale=scale, compute=torch.float64)
    return [
        out,
        log_sums,
        *reference.attention_backward(
            grad, q, k, v, out, log_sums, scale=scale, compute=torch.float64
        ),
    ]


def by_torch(q, k, v, grad, scale):
    """The same by torch, without the logarithms."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = functional.scaled_dot_product_attention(
        *leaves, is_causal=True, scale=scale, enable_gqa=True
    )
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(serves, shape, spread):
    tensors = inputs(shape, spread=spread)
    out, log_sums, *grads = passes(*tensors, 0.2)
    true, true_sums, *true_grads = in_fp64(*tensors, 0.2)
    # sums of products of bf16 values are exact to fp32's rounding
    torch.testing.assert_close(log_sums.double(), true_sums.float().double(), atol=1e-5, rtol=1e-5)
    assert distance(out, true) < NORM
    for name, ours, theirs in zip("qkv", grads, true_grads):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == theirs.shape
        # a sequence of one position has no gradient of q and k
        assert distance(ours, theirs) < NORM or (shape[3] == 1 and name in "qk"), name


def test_matches_fp64_at_every_head_size(serves):
    for d in kernel.HEAD_DIMS:
        tensors = inputs((1, 2, 1, 67, d), spread=0.5)
        results, true = passes(*tensors, d**-0.5), in_fp64(*tensors, d**-0.5)
        assert all(distance(a, b) < NORM for a, b in zip(results, true, strict=True)), d


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_is_no_worse_than_torchs_where_one_position_takes_all(serves, shape):
    """Gradients of q and k are then small differences of rounded values, whoever computes them."""
    tensors = inputs(shape, spread=4.0)
    out, _, *grads = passes(*tensors, 0.2)
    true, _, *true_grads = in_fp64(*tensors, 0.2)
    for ours, theirs, wanted in zip(
        [out, *grads], by_torch(*tensors, 0.2), [true, *true_grads], strict=True
    ):
        assert distance(ours, wanted) < 1.5 * distance(theirs, wanted) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_definition_is_torchs(dtype):
    tensors = inputs((2, 6, 2, 40, 32), dtype)
    ours = reference.attention(*tensors[:3], scale=0.3)
    grads = reference.attention_backward(tensors[3], *tensors[:3], *ours, scale=0.3)
    theirs = by_torch(*(t.float() for t in tensors), 0.3)
    # the results' own rounding; in fp32 the order of sums
    bound = 1e-6 if dtype == torch.float32 else NORM
    for a, b in zip([ours[0], *grads], theirs, strict=True):
        assert distance(a, b) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_differentiable(dtype):
    q, k, v, grad = inputs((2, 6, 2, 70, 64), dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, log_sums = torch.ops.fastprune.attention(*leaves, 0.125)
    assert not log_sums.requires_grad
    out.backward(grad)
    expected = kernel.attention_backward(grad, q, k, v, out.detach(), log_sums, scale=0.125)
    for leaf, wanted in zip(leaves, expected):
        assert torch.equal(leaf.grad, wanted)


def test_traces_like_it_runs():
    q, k, v, _ = inputs((1, 4, 2, 20, 32), torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.fastprune.attention.default, (*leaves, 0.2))


def test_ignores_what_comes_later(serves):
    q, k, v, _ = inputs((1, 3, 1, 150, 64))
    before, _ = kernel.attention(q, k, v, scale=0.2)
    for t in (q, k, v):
        t[:, :, 100:] = 1e4
    after, _ = kernel.attention(q, k, v, scale=0.2)
    assert torch.equal(before[:, :, :100], after[:, :, :100])


def test_layouts_do_not_matter(serves):
    q, k, v, grad = inputs((2, 6, 2, 90, 64))
    spaced = torch.empty(*q.shape[:3], 2 * q.shape[3], dtype=q.dtype)[..., ::2].copy_(q)
    lazy = [torch._neg_view(-t) for t in (q, k, v, grad)]
    ways = [(q, k, v, grad), [t.contiguous() for t in (q, k, v, grad)], (spaced, k, v, grad), lazy]
    results = [passes(*way, 0.2) for way in ways]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_tensors_may_be_expanded(serves):
    q, k, v, grad = inputs((2, 6, 2, 90, 64))
    wide = [t[:, :1].expand(t.shape) for t in (q, k, v)] + [grad[..., :1].expand(grad.shape)]
    results = [passes(*way, 0.2) for way in (wide, [t.contiguous() for t in wide])]
    assert all(map(torch.equal, *results))


def test_threads_do_not_matter(serves):
    tensors = inputs((1, 9, 3, 300, 64))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(passes(*tensors, 0.2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(3))
def test_what_is_broken_shows(serves, value, which):
    tensors = inputs((1, 2, 1, 80, 64))
    tensors[which][0, 0, 40, 3] = value
    out, _, *grads = passes(*tensors, 0.2)
    assert not out.isfinite().all()
    assert not all(g.isfinite().all() for g in grads)


def test_huge_scores_do_not_overflow(serves):
    results = passes(*inputs((1, 2, 1, 80, 64), spread=1000.0), 1.0)
    assert all(t.isfinite().all() for t in results)


def test_of_nothing_is_nothing():
    q, k, v, grad = inputs((0, 2, 1, 5, 16))
    out, _, *grads = passes(q, k, v, grad, 0.2)
    assert out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_serves_only_what_it_can():
    assert not kernel.attention_serves(torch.device("meta"), 64)
    assert not kernel.attention_serves(torch.device("cpu"), 72)
    assert not kernel.attention_serves(torch.device("cpu"), 272)


def test_lower_levels_do_without(module):
    level = module.cpu_level()
    try:
        module.set_cpu_level(module.cpu_levels()[0])
        assert not kernel.attention_serves(torch.device("cpu"))
        q, k, v, _ = inputs((1, 2, 1, 20, 64))
        out, _ = kernel.attention(q, k, v, scale=0.2)
        assert distance(out, reference.attention(q, k, v, scale=0.2)[0]) == 0
        workspace = torch.empty(1 << 20, dtype=torch.uint8)
        sums = torch.empty(1, 2, 20)
        with pytest.raises(ValueError, match="no AVX512-BF16, or a level below v4"):
            module.attention(q, k, v, 0.2, out, sums, workspace)
    finally:
        module.set_cpu_level(level)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q must have 4 dimensions"),
        (lambda q, k, v: (q.int(), k, v), "q must be float32 or bfloat16 or float16"),
        (lambda q, k, v: (q, k.float(), v), "k must be bfloat16"),
        (lambda q, k, v: (q[:, :3], k, v), "k of shape .* does not go with q"),
        (lambda q, k, v: (q, k[:, :, 1:], v), "k of shape .* does not go with q"),
        (lambda q, k, v: (q, k, v[:, :1]), "v has shape"),
        (lambda q, k, v: (q.to("meta"), k, v), "q has no memory"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kernel.attention(*change(*inputs((1, 4, 2, 8, 16))[:3]), scale=0.2)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_the_scale_is_positive(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        kernel.attention(*inputs((1, 4, 2, 8, 16))[:3], scale=scale)


def test_the_module_checks_by_itself(module, serves):
    q, k, v, _ = inputs((1, 4, 2, 8, 16))
    out, sums, workspace = torch.empty_like(q), torch.empty(32), torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="attention: workspace is too small"):
        module.attention(q, k, v, 0.2, out, sums, workspace)
    workspace = torch.empty(module.attention_workspace(q, k), dtype=torch.uint8)
    with pytest.raises(ValueError, match="out has shape"):
        module.attention(q, k, v, 0.2, k, sums, workspace)
    with pytest.raises(ValueError, match="log_sums must be contiguous with at least 32"):
        module.attention(q, k, v, 0.2, out, sums[:5], workspace)
