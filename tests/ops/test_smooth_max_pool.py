"""smooth_max_pool: the published values, its bounds, and every backend's error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends

BACKENDS = cpu_backends("smooth_max_pool")


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_of_the_notes(backend):
    z = torch.tensor([[[[2.0, -1.0], [0.0, -3.0]]]], dtype=torch.float64)
    t = F.smooth_max_pool(z, backend=backend)
    assert t.item() == pytest.approx(0.789221, abs=1e-6)
    assert t.sigmoid().item() == pytest.approx(0.687664, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 40),
    st.sampled_from([0.1, 1.0, 20.0]), st.integers(0, 50),
)  # fmt: skip
def test_any_size_is_the_definition(backend, batch, classes, height, width, k, seed):
    generator = torch.Generator().manual_seed(seed)
    z = 5 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    found = F.smooth_max_pool(z, k=k, backend=backend)
    wanted = (k * z).exp().mean((2, 3)).log() / k
    assert torch.allclose(found, wanted, atol=1e-10)
    weight = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    one, two = (torch.autograd.grad((x * weight).sum(), z)[0] for x in (found, wanted))
    assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_lies_between_mean_and_max_and_does_not_overflow(backend, k, dtype):
    z = (torch.randn(2, 3, 50, 70) * 300).to(dtype)
    t = F.smooth_max_pool(z, k=k, backend=backend)
    assert t.dtype == torch.float32 and torch.isfinite(t).all()
    assert (t <= z.float().flatten(2).amax(2) + 1e-3).all()
    assert (t >= z.float().flatten(2).mean(2) - 1e-3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_without_probability_and_a_nan(backend):
    z = torch.full((1, 3, 40, 40), -torch.inf)
    z[0, 0, 39] = 2.0
    z[0, 1, 20] = torch.nan
    z.requires_grad_()
    t = F.smooth_max_pool(z, backend=backend)[0]
    assert t[0].item() == pytest.approx(2 - torch.tensor(40.0).log().item(), abs=1e-5)
    assert t[1].isnan() and t[2] == -torch.inf
    grad = torch.autograd.grad(t.sum(), z)[0][0]
    assert torch.allclose(grad[0, 39], torch.tensor(1 / 40)) and grad[0, :39].abs().max() < 1e-30
    assert grad[1:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_shares_add_up_whatever_the_score_is_rounded_to(backend, seed):
    z = (100 + torch.randn(1, 3, 33, 64, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    (grad,) = torch.autograd.grad(F.smooth_max_pool(z, k=20.0, backend=backend).sum(), z)
    exact = (20 * z.detach().double()).flatten(2).softmax(2).reshape(z.shape)
    # 20 z = 2000 is rounded to 6e-5: the reference cannot do better
    limit = 2e-4 if backend == "reference" else 4e-6
    assert (grad - exact).abs().max() < limit * exact.max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    z = torch.randn(2, 3, 5, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: F.smooth_max_pool(z, k=2.0, backend=backend), z)
