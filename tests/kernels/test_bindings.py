"""The bindings of the compiled module, called past the functions that check arguments for them."""

import gc

import pytest
import torch

from fastprune.kernels import ops
from fastprune.kernels.declarations import AdamWBuffers, AdamWRule

F64 = torch.float64


def workspace(size=1 << 16):
    return torch.zeros(size, dtype=torch.uint8)


def unaligned(shape, dtype=torch.float32):
    """Zeros at an odd address."""
    count = torch.Size(shape).numel()
    memory = bytearray(count * dtype.itemsize + 1)
    return torch.frombuffer(memory, dtype=dtype, offset=1, count=count).view(shape)


def taylor_arguments():
    w, rows, cols = torch.ones(4, 5), torch.zeros(4), torch.zeros(5)
    optional = {"g": None, "h": None, "x": None}
    results = {"rows": rows, "cols": cols, "workspace": workspace()}
    return {"w": w} | optional | {"kind": "l1"} | results


def cross_entropy_arguments():
    logits, targets = torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64)
    results = {"loss": torch.zeros(4), "log_normaliser": torch.zeros(4)}
    return {"logits": logits, "targets": targets, "scale": None} | results


def heads(n=5):
    q, k = torch.zeros(1, 4, n, 16, dtype=torch.bfloat16), torch.zeros(1, 2, n, 16).bfloat16()
    out, log_sums = torch.zeros_like(q), torch.zeros(1, 4, n)
    inputs = {"q": q, "k": k, "v": k.clone(), "scale": 0.5}
    return inputs | {"out": out, "log_sums": log_sums, "workspace": workspace(1 << 20)}


@pytest.mark.parametrize("name", ["w", "kind", "rows", "cols", "workspace"])
def test_what_is_needed_is_not_none(module, name):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        module.taylor(**taylor_arguments() | {name: None})


@pytest.mark.parametrize("name", ["logits", "targets", "loss", "log_normaliser"])
def test_cross_entropy_needs_all_but_a_scale(module, name):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        module.cross_entropy(**cross_entropy_arguments() | {name: None})


def test_none_in_a_list_is_named(module):
    out = torch.zeros(1, 10, dtype=F64)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, not None"):
        module.scan([None], out, workspace())
    w, index = torch.ones(4, 5), torch.tensor([1])
    for lists in (([None], [index], [0]), ([w], [None], [0])):
        with pytest.raises(ValueError, match="gather: "):
            module.gather(*lists, False, [torch.zeros(1, 5)], None)


@pytest.mark.parametrize("size", [(2**31, 2**31), (2**24 + 1, 2**24)])
def test_more_elements_than_can_be_counted(module, size):
    huge = torch.ones(()).expand(size)
    for call in (module.taylor_workspace, lambda t: module.scan_workspace([t])):
        with pytest.raises(ValueError, match="has too many elements"):
            call(huge)
    with pytest.raises(ValueError, match="has too many elements"):
        module.taylor_workspace(torch.empty(0, 2**62))


def test_elements_lie_at_multiples_of_their_size(module):
    for name in ("w", "rows"):
        wrong = {name: unaligned(taylor_arguments()[name].shape)}
        with pytest.raises(ValueError, match="no multiple of its elements' size"):
            module.taylor(**taylor_arguments() | wrong)
    with pytest.raises(ValueError, match="workspace must begin at a multiple of 64 bytes"):
        module.taylor(**taylor_arguments() | {"workspace": workspace()[8:]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"rows": a["cols"][:4]}, "(rows and cols|cols and rows) share memory"),
        (lambda a: {"rows": a["w"].view(-1)[:4]}, "(rows and w|w and rows) share memory"),
        (lambda a: {"workspace": a["w"].view(torch.uint8).flatten()}, "share memory"),
    ],
)
def test_what_is_written_lies_apart(module, change, message):
    arguments = taylor_arguments()
    arguments["w"] = workspace(1 << 12).view(torch.float32)[:20].view(4, 5)
    with pytest.raises(ValueError, match=f"taylor: {message}"):
        module.taylor(**arguments | change(arguments))


def test_targets_are_not_overwritten_while_they_are_read(module):
    arguments = cross_entropy_arguments()
    loss = arguments["targets"].view(torch.float32)[:4]
    with pytest.raises(ValueError, match="share memory, and one is written"):
        module.cross_entropy(**arguments | {"loss": loss})
    assert not bool(arguments["targets"].any())


def test_an_index_is_not_overwritten_while_it_is_read(module):
    """Through the public function: what is written behind an index would be read as positions."""
    memory = torch.arange(9)
    values = torch.full((20,), 2**40)
    with pytest.raises(ValueError, match=r"index 0 and result 0|result 0 and index 0"):
        ops.gather([values], [memory[:8]], [0], out=[memory[1:]])
    assert torch.equal(memory, torch.arange(9))


def test_kinds_and_rules_are_names(module):
    for kind in (3, b"l1", ["l1"]):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            module.taylor(**taylor_arguments() | {"kind": kind})
    with pytest.raises(ValueError, match="kind 'none' is unknown"):
        module.taylor(**taylor_arguments() | {"kind": "none"})


def test_workspaces_of_attention_are_those_of_heads(module):
    if not module.attention_serves():
        pytest.skip("no bf16 attention here")
    q, k = heads()["q"], heads()["k"]
    for wrong in ((None, k), (q, None)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            module.attention_workspace(*wrong)
    for wrong in ((q[0], k), (q, k[0]), (q.float(), k), (q[:, :3], k), (q[:, :, :0], k[:, :, :0])):
        with pytest.raises(ValueError, match="attention: "):
            module.attention_workspace(*wrong)
    for at_once in (0, -1, -(2**40)):
        with pytest.raises(ValueError, match="at_once must be positive"):
            module.attention_backward_workspace(q, at_once)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        module.attention_backward_workspace(q[0], 1)


def test_attention_writes_into_one_block_apart_from_the_rest(module):
    if not module.attention_serves():
        pytest.skip("no bf16 attention here")
    arguments = heads()
    spread = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16).expand(arguments["q"].shape)
    with pytest.raises(ValueError, match="out must fill one block of memory"):
        module.attention(**arguments | {"out": spread})
    with pytest.raises(ValueError, match="share memory"):
        module.attention(**arguments | {"out": arguments["q"]})


# ---------------------------------------------------------------------------- adamw


def adamw_step(module, n=2):
    params = [torch.ones(3, 4) for _ in range(n)]
    states = [{"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)} for _ in params]
    held = module.AdamWStates()
    held.sync(states)
    buffers = AdamWBuffers(
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, 2, dtype=F64),
        torch.zeros(2, dtype=F64),
        torch.tensor([1.0, 0.0, 0.0], dtype=F64),
        workspace(),
    )
    arguments = {
        "params": params,
        "grads": [torch.ones(3, 4) for _ in params],
        "states": held,
        "group_of": [0] * n,
        "groups": [[1e-3, 0.9, 0.99, 1e-8, 0.0]],
        "buffers": buffers,
        "rule": AdamWRule(),
    }
    return arguments, states


def test_a_step_keeps_its_tensors_whatever_becomes_of_the_lists(module):
    arguments, _ = adamw_step(module)
    weights = list(arguments["params"])
    step = module.AdamWStep(**arguments)
    arguments["params"].clear()
    arguments["grads"].clear()
    gc.collect()
    [torch.full((3, 4), 7.0) for _ in range(50)]  # would take the place of what was freed
    step.norms()
    step.update()
    assert all(bool((w < 1).all()) for w in weights)


def test_a_step_ends_with_the_states_it_was_made_from(module):
    arguments, states = adamw_step(module)
    step = module.AdamWStep(**arguments)
    arguments["states"].sync(states[:1])
    for run in (step.norms, step.update):
        with pytest.raises(ValueError, match="the states were synced anew"):
            run()


@pytest.mark.parametrize("name", ["params", "grads", "states", "groups", "buffers", "rule"])
def test_adamw_needs_all_of_it(module, name):
    arguments, _ = adamw_step(module)
    with pytest.raises((TypeError, AttributeError)):
        module.AdamWStep(**arguments | {name: None})


@pytest.mark.parametrize("name", AdamWBuffers._fields)
def test_adamw_needs_its_buffers(module, name):
    arguments, _ = adamw_step(module)
    arguments["buffers"] = arguments["buffers"]._replace(**{name: None})
    with pytest.raises(ValueError, match="adamw: "):
        module.AdamWStep(**arguments).norms()


def test_states_are_dicts_of_tensors(module):
    held = module.AdamWStates()
    for states in ([None], [[]], [{"exp_avg": 3}]):
        with pytest.raises(TypeError):
            held.sync(states)


# ---------------------------------------------------------------------------- torch


def test_the_exchange_api_is_that_of_the_tensor_type(module):
    api = torch.Tensor.__dlpack_c_exchange_api__
    for wrong in ((int, api), (torch.Tensor, None), (None, api), (torch.Tensor, "x")):
        with pytest.raises((TypeError, ValueError)):
            module.connect(*wrong)
    module.connect(torch.Tensor, api)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_functions_copy_what_is_not_aligned(device, dtype):
    if device.type != "cpu":
        pytest.skip("memory of the host")
    x = unaligned((6, 5), dtype)
    x.copy_(torch.arange(30).view(6, 5))
    index = unaligned((2,), torch.int64)
    index.copy_(torch.tensor([1, 4]))
    assert ops.scan(x).max == 29
    assert ops.taylor(x, kind="l1")[0].tolist() == x.float().sum(1).tolist()
    assert torch.equal(ops.gather([x], [index], [0])[0], x[[1, 4]])
    loss, _ = ops.cross_entropy(x, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(loss, ops.cross_entropy(x.clone(), torch.zeros(6, dtype=torch.int64))[0])
