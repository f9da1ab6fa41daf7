"""The error of every kernel with a GPU's arithmetic stays within the budgets that tests/gpu holds it to. Run
by tests/kernels/test_kernels.py in a process of its own, as interpreted.py."""

from __future__ import annotations

import pytest
import torch

import fastuda.ops as F
from tests.cases import every
from tests.cases._inputs import normal
from tests.helpers import judge, value_and_gradient
from tests.kernels.instruments import gpu_arithmetic

HALF = (torch.bfloat16, torch.float16)
CASES = {name: (x, function) for _, name, x, function in every("small")}

PRODUCTS = {"association": "tensor cores", "aggregation": "tensor cores"}
"""What half precision must run on."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES] + [(name, dtype) for name in PRODUCTS for dtype in HALF],
)
def test_error_is_within_the_budget(name, dtype, monkeypatch):
    x, function = CASES[name]
    x = x.to(dtype)

    with monkeypatch.context() as patch:
        met = gpu_arithmetic(patch, half=dtype in HALF)
        found = value_and_gradient(function, x, "triton", dtype)
    if dtype in HALF:
        assert met == {PRODUCTS[name]}
    judge(function, x, found)


def test_the_arithmetic_is_that_of_a_gpu(monkeypatch):
    """An LSE that is rebuilt from a rounded quotient costs more than the budget: that must show."""
    z = 3 * normal(6, 187)
    k = 3.0
    with monkeypatch.context() as patch:
        gpu_arithmetic(patch, half=False)
        pooled = F.smooth_max_pool(z[:, None, None], k=k, backend="triton")[:, 0]
    exact = torch.logsumexp(k * z.double(), 1)
    rebuilt = pooled.double() * k + torch.tensor(187.0).log()
    assert (rebuilt - exact).abs().max() > 2.0**-24 * exact.abs().max()
