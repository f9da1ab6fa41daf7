"""What holds for every op by its case: the operators fit their schemas, a compiled graph has no break, and
neither threads nor a second run change a bit."""

import re

import pytest
import torch

from bench.case import Bench
from fastuda.ops import _backends
from fastuda.ops._schema import IMPLEMENTATIONS
from tests import cases
from tests.cases import OPS, case, every, good
from tests.helpers import cpu_backends, flat, judge, run, value_and_gradient

KERNELS = [op for op in OPS if "cpu" in [backend.id for backend in cpu_backends(op)]]
OPERATORS = every("operators", "cpu")
SAMPLES = [row for row in every("small") if row[0] in KERNELS]
COMPILED = [
    (op, backend.id)
    for op in OPS
    if getattr(case(op), "GRADIENTS", 1)
    for backend in cpu_backends(op)
    if backend.id != "reference" or op not in ("lovasz_softmax", "prototype_contrast")  # which gather rows
]


def is_own(op, value):
    """Whether it is defined in the case and not imported there."""
    return isinstance(value, int | dict | Bench) or getattr(value, "__module__", "") == case(op).__name__


@pytest.mark.parametrize("op", OPS)
def test_cases_are_complete(op):
    """What is missing, or misspelt, would not be tested."""
    names = {name for name, value in vars(case(op)).items() if name[0] != "_" and is_own(op, value)}
    known = set(re.findall(r"``(\w+)(?:\(.*?\))?``", cases.__doc__))
    wanted = {"good"}
    if _backends.BACKENDS[op][0].operators:
        wanted |= {"operators"}
        assert {name for name, *_ in case(op).operators("cpu")} == set(_backends.BACKENDS[op][0].operators)
    if any(row.name == "triton" for row in _backends.BACKENDS[op]):
        wanted |= {"samples", "small", "compiled"}
    assert wanted <= names <= known, (wanted - names, names - known)


@pytest.mark.parametrize(("op", "operator", "args"), [(op, x, args) for op, x, *args in OPERATORS])
def test_opcheck(op, operator, args):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastuda::{operator}.cpu", "CPU"):
        pytest.skip("the C++ extension is not built")
    torch.library.opcheck(getattr(torch.ops.fastuda, operator).cpu, tuple(args))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", KERNELS)
def test_fakes_give_the_shapes(op, implementation):
    for (name, *args), (_, *metas) in zip(case(op).operators("cpu"), case(op).operators("meta"), strict=True):
        real = flat(_backends.overload(name, "cpu")(*args))
        fake = flat(_backends.overload(name, implementation)(*metas))
        assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize(("op", "backend"), COMPILED)
def test_compiled_without_a_break(op, backend):
    torch._dynamo.reset()  # other ops would count as recompilations, whose number is limited

    def compiled(call):
        return torch.compile(call, fullgraph=True, backend="aot_eager")

    for one, two in zip(run(op, backend, good(op), compiled), run(op, backend, good(op)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "name", "x", "function"), SAMPLES)
def test_error_budget(op, name, x, function, dtype):
    x = x.to(dtype)
    judge(function, x, value_and_gradient(function, x, "cpu", dtype))


@pytest.mark.parametrize(("op", "name", "x", "function"), SAMPLES)
def test_threads_do_not_change_a_bit(op, name, x, function):
    def results():
        return value_and_gradient(function, x, "cpu", x.dtype)

    threads, wanted = torch.get_num_threads(), results()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        found = results()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
