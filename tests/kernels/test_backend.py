import os
import subprocess
import sys

import pytest
import torch

from fastprune.kernels import backend, cpu_level


def python(code, **environment):
    """Runs code in a fresh interpreter, where import-time choices are made anew."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code],  # what is installed, not the folder
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_backends_say_why(module):
    cpu, cuda = backend.backends()
    assert (cpu.name, cpu.usable) == ("cpu", True)
    assert f"level {module.cpu_level()}" in cpu.detail
    assert cuda.name == "cuda"
    assert cuda.usable or cuda.reason


def test_the_highest_level_is_chosen(module):
    if "FASTPRUNE_CPU_LEVEL" not in os.environ:
        assert cpu_level() == module.cpu_levels()[-1]


def test_levels_can_be_forced(module):
    lowest = module.cpu_levels()[0]
    code = "from fastprune.kernels import cpu_level; print(cpu_level())"
    assert python(code, FASTPRUNE_CPU_LEVEL=lowest).stdout.strip() == lowest


def test_an_unknown_level_falls_back_with_a_reason(module):
    code = (
        "from fastprune.kernels import backends; print(backends()[0].usable, backends()[0].reason)"
    )
    result = python(code, FASTPRUNE_CPU_LEVEL="v9")
    assert result.returncode == 0
    assert result.stdout.startswith("False CPU level 'v9' is not usable here; choose from ")


def test_a_missing_module_falls_back_with_a_reason():
    code = (
        "import sys; sys.modules['fastprune.kernels._C'] = None\n"
        "import torch; from fastprune.kernels import backends, cpu_level, taylor, AdamW\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "AdamW([p], lr=0.5, weight_decay=0, eps=0).step()\n"
        "print(cpu_level(), [round(v, 6) for v in p.tolist()])\n"
        "print(taylor(torch.ones(2, 2), kind='l1')[0].tolist())\n"
        "print(backends()[0].reason)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:2] == ["None [0.5, 0.5, 0.5]", "[2.0, 2.0]"]
    assert "does not load" in result.stdout.splitlines()[2]


def test_devices_without_kernels_have_none():
    assert backend.compiled(torch.device("meta")) is None


def test_unknown_levels_are_refused(module):
    with pytest.raises(ValueError, match="CPU level 'sse' is not usable here; choose from"):
        module.set_cpu_level("sse")


def test_torch_keeps_its_threads(module):
    """The kernels borrow torch's pool; they neither resize it nor bring their own."""
    code = (
        "import os, torch; from fastprune.kernels import taylor\n"
        "torch.set_num_threads(2); w = torch.ones(2000, 2000); w.sum()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "taylor(w, kind='l1')\n"
        "print(len(os.listdir('/proc/self/task')) - before, torch.get_num_threads())"
    )
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    assert python(code).stdout.split() == ["0", "2"]
