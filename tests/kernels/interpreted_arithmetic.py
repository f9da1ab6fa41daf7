"""The error of every kernel with a GPU's arithmetic stays within the budgets that tests/gpu holds it to. Run
by tests/kernels/test_kernels.py in a process of its own, as interpreted.py."""

from __future__ import annotations

import pytest
import torch

import fastuda.ops as F
from tests.gpu import test_ops as on_gpu
from tests.helpers import within_budget
from tests.kernels.instruments import gpu_arithmetic

on_gpu.DEVICE = "cpu"
HALF = (torch.bfloat16, torch.float16)


def small_domain(x, backend, **options):
    z = 4 * on_gpu.normal(1, 19, 3, 4, seed=4).to(x)
    return F.domain_cross_entropy(x, z, encode="target", size=(15, 22), backend=backend, **options)


def small_entropy(x, backend):
    return F.upsample_cross_entropy(x, on_gpu.classes_of(1, 15, 22), backend=backend)


def small_lovasz(x, backend):
    labels = on_gpu.classes_of(1, 15, 22, classes=5)
    return F.lovasz_softmax(x, labels, from_logits=True, backend=backend)


def predictions(n, seed=0):
    return (2 * on_gpu.normal(1, n, 19, seed=seed)).softmax(-1)


def match_of_predictions(x, backend):
    labels = on_gpu.classes_of(1, 60, classes=3)
    target = predictions(70, seed=3).to(x)
    return F.cycle_association_loss(x, target, labels, similarity="kl", backend=backend)[0]


PIXELS = (4 * on_gpu.normal(1, 5, 9, 30)).softmax(1)

SMALL_ENOUGH = (
    "association", "aggregation", "pooling", "contrast", "proto", "dist", "bank", "cleaning",
    "category features", "category attention",
)  # fmt: skip

CASES = {
    **{name: on_gpu.CASES[name][1:] for name in SMALL_ENOUGH},
    "entropy": (3 * on_gpu.normal(1, 19, 4, 5), small_entropy),
    "domain": (3 * on_gpu.normal(1, 38, 4, 5), small_domain),
    "hard domain": (
        3 * on_gpu.normal(1, 38, 4, 5),
        lambda x, b: small_domain(x, b, hard_threshold=0.4, align_corners=False),
    ),
    "lovasz": (3 * on_gpu.normal(1, 5, 4, 5), small_lovasz),
    "affinity": (PIXELS, lambda x, b: F.local_affinity(x, backend=b)),
    "product": (PIXELS, lambda x, b: F.local_affinity(x, kind="product", backend=b)),
    "association of predictions": (predictions(60), match_of_predictions),
    "aggregation of predictions": (
        predictions(60),
        lambda x, b: F.spatial_aggregate(x, similarity="kl", backend=b),
    ),
}
"""Input and function by name: those of tests/gpu, smaller where the interpreter would take long."""

PRODUCTS = {"association": "tensor cores", "aggregation": "tensor cores"}
"""What half precision must run on."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES] + [(name, dtype) for name in PRODUCTS for dtype in HALF],
)
def test_error_is_within_the_budget(name, dtype, monkeypatch):
    x, function = CASES[name]
    x = x.to(dtype)

    def run(backend, work):
        leaf = x.to(work, copy=True).requires_grad_()
        value = function(leaf, backend)
        weight = torch.linspace(-1, 2, value.numel()).reshape(value.shape).to(value.dtype)
        return value.detach(), torch.autograd.grad(value, leaf, weight)[0]

    plain, truth = run("reference", dtype), run("reference", torch.float64)
    with monkeypatch.context() as patch:
        met = gpu_arithmetic(patch, half=dtype in HALF)
        found = run("triton", dtype)
    if dtype in HALF:
        assert met == {PRODUCTS[name]}
    for part, *three in zip(("value", "gradient"), found, plain, truth, strict=True):
        within_budget(*three, part, dtype if three[0].dtype == dtype else torch.float32)


def test_the_arithmetic_is_that_of_a_gpu(monkeypatch):
    """An LSE that is rebuilt from a rounded quotient costs more than the budget: that must show."""
    z = 3 * on_gpu.normal(6, 187)
    k = 3.0
    with monkeypatch.context() as patch:
        gpu_arithmetic(patch, half=False)
        pooled = F.smooth_max_pool(z[:, None, None], k=k, backend="triton")[:, 0]
    exact = torch.logsumexp(k * z.double(), 1)
    rebuilt = pooled.double() * k + torch.tensor(187.0).log()
    assert (rebuilt - exact).abs().max() > 2.0**-24 * exact.abs().max()
