"""Every signature of an op is the declared one: compiled, in the stub, in plain torch, eager."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from fastprune import kernels
from fastprune.kernels import attention, ops, reference
from fastprune.kernels.declarations import OPS, SCAN, TENSOR

STUB = ast.parse((Path(kernels.__file__).parent / "_C.pyi").read_text())
NAMES = [op.name for op in OPS]


def arguments_of_stub(function: ast.FunctionDef) -> dict[str, str]:
    return {a.arg: ast.unparse(a.annotation) for a in function.args.args if a.annotation}


def arguments_of_compiled(function) -> list[str]:
    """The names in the signature that pybind11 writes at the head of a docstring."""
    signature = function.__doc__.partition("->")[0]
    return [name for name in re.findall(r"(\w+):", signature) if name != "self"]


def stubbed(kind):
    return {node.name: node for node in STUB.body if isinstance(node, kind)}


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_stub(op):
    functions = stubbed(ast.FunctionDef)
    assert arguments_of_stub(functions[op.name]) == op.arguments
    sizes = functions.get(f"{op.name}_workspace")
    assert (sizes is None) == (not op.workspace)
    if sizes is not None:
        assert tuple(arguments_of_stub(sizes)) == op.workspace


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_plain_function(op):
    """It takes the inputs, and what the tests ask of it besides."""
    parameters = inspect.signature(getattr(reference, op.name)).parameters
    assert [name for name in parameters if name != "compute"] == list(op.inputs)


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_eager_function(op):
    module = attention if op.name.startswith("attention") else ops
    function = ops.scan_table if op is SCAN else getattr(module, op.name)
    parameters = inspect.signature(function).parameters
    assert [name for name in parameters if name not in op.results] == [
        name for name in op.inputs if name not in op.results
    ]


def test_compiled_functions(module):
    """All of them, with the arguments of the stub."""
    functions = stubbed(ast.FunctionDef)
    assert {name for name in dir(module) if inspect.isroutine(getattr(module, name))} == {
        *functions
    }
    for name, function in functions.items():
        assert arguments_of_compiled(getattr(module, name)) == list(arguments_of_stub(function))


def test_classes(module):
    """Those of plain torch have the same methods with the same arguments."""
    for name, stub in stubbed(ast.ClassDef).items():
        for method in stub.body:
            plain, compiled = (
                getattr(getattr(home, name), method.name) for home in (reference, module)
            )
            assert [*inspect.signature(plain).parameters][1:] == list(arguments_of_stub(method))
            assert arguments_of_compiled(compiled) == list(arguments_of_stub(method))


def test_a_value_that_is_missing_is_named(module):
    with pytest.raises(KeyError, match="out"):
        SCAN.run(module, None, tensors=[])


def test_workspace_is_the_last_argument():
    assert all(list(op.arguments)[-1] == "workspace" for op in OPS if op.workspace)
    assert all(op.arguments.get("workspace", TENSOR) == TENSOR for op in OPS)
