"""category_pool: the published value, the definition, and every backend's error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, within_budget

BACKENDS = cpu_backends("category_pool")


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_of_the_notes(backend):
    z = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64).reshape(1, 4, 1)
    f = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).reshape(1, 4, 1)
    assert F.category_pool(f, z, backend=backend).item() == pytest.approx(3.492653, abs=1e-6)


def case(batch, pixels, channels, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(batch, pixels, channels, generator=generator, dtype=torch.float64)
    z = 3 * torch.randn(batch, pixels, classes, generator=generator, dtype=torch.float64)
    return f, z, torch.randn(batch, classes, channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 150), st.integers(1, 40), st.integers(1, 7), st.integers(0, 50),
    st.sampled_from(["both", "features", "logits"]),
)  # fmt: skip
def test_any_size_is_the_definition(backend, batch, pixels, channels, classes, seed, wanted_of):
    f, z, weight = case(batch, pixels, channels, classes, seed)
    f.requires_grad_(wanted_of != "logits")
    z.requires_grad_(wanted_of != "features")
    found = F.category_pool(f, z, backend=backend)
    wanted = torch.einsum("bik,bic->bkc", z.exp() / z.exp().sum(1, keepdim=True), f)
    assert torch.allclose(found, wanted, atol=1e-10)
    leaves = [x for x in (f, z) if x.requires_grad]
    for one, two in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(wanted, leaves, weight), strict=True
    ):
        assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pixels", "channels", "classes"), [(63, 97, 5), (700, 300, 19)])
def test_error_budget(backend, dtype, pixels, channels, classes):
    f, z, weight = case(2, pixels, channels, classes)
    f, z = f.to(dtype).transpose(1, 2).contiguous().transpose(1, 2), z.to(dtype)

    def run(f, z, name):
        leaves = [x.clone().requires_grad_() for x in (f, z)]
        pooled = F.category_pool(*leaves, backend=name)
        return pooled.detach(), *torch.autograd.grad(pooled, leaves, weight.to(pooled.dtype))

    found, plain = run(f, z, backend), run(f, z, "reference")
    truth = run(f.double(), z.double(), "reference")
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    within_budget(found[0], plain[0], truth[0], "value", torch.float32)
    within_budget(found[1], plain[1], truth[1], "gradient of the features", dtype)
    within_budget(found[2], plain[2], truth[2], "gradient of the logits", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_in_bfloat16_do_not_overflow(backend):
    f, z, _ = case(1, 200, 10, 3)
    z = (300 * z).bfloat16()
    best = torch.tensor([3, 150, 199])
    z[0, best, torch.arange(3)] = 2.0**14
    pooled = F.category_pool(f.bfloat16(), z, backend=backend)
    assert torch.allclose(pooled[0], f.bfloat16().float()[0, best], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    leaves = [x[:, :5].requires_grad_() for x in case(2, 90, 11, 3)[:2]]
    assert torch.autograd.gradcheck(lambda f, z: F.category_pool(f, z, backend=backend), leaves)
