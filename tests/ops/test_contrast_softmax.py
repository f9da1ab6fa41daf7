"""contrast_softmax against its definition, and the identities that the fused ops rest on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import contrast_normalised, cpu_backends, rows, similarity, within_budget

BACKENDS = cpu_backends("contrast_softmax")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 97), (5, 2), (1, 1000), (63, 64)])
def test_value_and_gradient(backend, dtype, shape):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight = torch.randn(shape, dtype=torch.float64)

    def run(x, function):
        x = x.detach().clone().requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad((y.double() * weight).sum(), x)[0]

    truth = run(x.double(), lambda x: contrast_normalised(x).softmax(-1))
    plain = run(x, lambda x: contrast_normalised(x).softmax(-1))
    found = run(x, lambda x: F.contrast_softmax(x, backend=backend))
    for name, mine, theirs, exact in zip(("output", "gradient"), found, plain, truth, strict=True):
        assert mine.dtype == dtype
        within_budget(mine, theirs, exact, name, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_one_is_one_and_a_constant_row_is_uniform(backend):
    assert torch.equal(F.contrast_softmax(torch.tensor([[3.0]]), backend=backend), torch.ones(1, 1))
    flat = F.contrast_softmax(torch.full((2, 8), 0.5), backend=backend)
    assert torch.allclose(flat, torch.full((2, 8), 0.125), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 200), shift=st.floats(-50, 50), scale=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_rows_sum_to_one_whatever_the_shift_and_scale(backend, n, shift, scale, seed):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = F.contrast_softmax(x, backend=backend)
    assert (y.sum(-1) - 1).abs().max() < 1e-9
    assert torch.allclose(F.contrast_softmax(x * scale + shift, backend=backend), y, atol=1e-7)


def test_contrast_normalisation_is_a_temperature_per_row():
    sim = similarity(rows(1, 20, 9, 0), rows(1, 30, 9, 1), "cosine")
    temperature = sim.std(-1, keepdim=True) + 1e-10
    assert torch.allclose(F.contrast_softmax(sim), (sim / temperature).softmax(-1), atol=1e-12)


def test_temperature_follows_from_the_covariance_of_the_keys():
    query, key = rows(1, 20, 9, 0)[0], rows(1, 30, 9, 1)[0]
    query, key = query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True)
    covariance = torch.cov(key.T)
    assert torch.allclose((query @ key.T).var(1), ((query @ covariance) * query).sum(1), atol=1e-12)


def test_entropy_drops_out_of_the_kl_similarity():
    p, q = rows(1, 20, 9, 0, "kl"), rows(1, 30, 9, 1, "kl")
    full, inner = similarity(p, q, "kl"), p @ (q + 1e-10).log().transpose(1, 2)
    assert torch.equal(full.argmax(-1), inner.argmax(-1))
    assert torch.allclose(full.softmax(-1), inner.softmax(-1), atol=1e-12)
    assert torch.allclose(full.std(-1), inner.std(-1), atol=1e-12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must be \[..., M\]"):
        F.contrast_softmax(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating point"):
        F.contrast_softmax(torch.zeros(2, 2, dtype=torch.int64))
