"""spatial_aggregate: the authors' values, the definition, gradients, hard cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, rows, wave, within_budget
from tests.oracles.spatial_aggregate import literal

BACKENDS = cpu_backends("spatial_aggregate")


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_the_authors_code(backend):
    target = wave((2, 6, 3, 6), 0.23).flatten(2).transpose(1, 2)
    out = F.spatial_aggregate(target, alpha=1.0, backend=backend).transpose(1, 2)
    assert out.sum().item() == pytest.approx(19.0071819196, abs=2e-9)
    assert out.norm().item() == pytest.approx(5.7380002624, abs=2e-9)
    first = [0.24215755094536093, 0.5037259235527592, 0.32043283073311113]
    assert out.flatten()[:3].tolist() == pytest.approx(first, abs=1e-9)
    p = (2 * wave((2, 5, 3, 6), 0.17)).softmax(1).flatten(2).transpose(1, 2)
    out = F.spatial_aggregate(p, alpha=1.0, similarity="kl", contrast=False, backend=backend)
    assert out.sum().item() == pytest.approx(36, abs=1e-9)
    assert out.norm().item() == pytest.approx(2.7994279178, abs=2e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cosine", "kl"])
@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "n", "c"), [(2, 63, 19), (1, 97, 64), (3, 2, 5)])
def test_value_and_gradient(backend, kind, contrast, dtype, b, n, c):
    x = rows(b, n, c, 1, kind).to(dtype)
    weight = torch.randn(b, n, c, dtype=torch.float64)

    def run(x, function):
        x = x.detach().clone().requires_grad_()
        out = function(x)
        return out.detach(), torch.autograd.grad((out.double() * weight).sum(), x)[0]

    truth = run(x.double(), lambda x: literal(x, kind, contrast))
    plain = run(x, lambda x: literal(x, kind, contrast))
    found = run(x, lambda x: F.spatial_aggregate(x, similarity=kind, contrast=contrast, backend=backend))
    for name, mine, theirs, exact in zip(("output", "gradient"), found, plain, truth, strict=True):
        assert mine.dtype == dtype
        within_budget(mine, theirs, exact, name, dtype)


@pytest.mark.parametrize("n", [1030, 2600])
def test_more_rows_than_a_panel_and_columns_than_a_chunk(n):
    x = rows(1, n, 6, 3).double().requires_grad_()
    g = rows(1, n, 6, 4).double()
    found, wanted = F.spatial_aggregate(x), F.spatial_aggregate(x, backend="reference")
    assert torch.allclose(found, wanted, atol=1e-12)
    mine, theirs = (torch.autograd.grad(y, x, g)[0] for y in (found, wanted))
    assert torch.allclose(mine, theirs, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pixel_and_equal_pixels_stay(backend):
    x = torch.randn(2, 1, 7)
    assert torch.allclose(F.spatial_aggregate(x, backend=backend), x, atol=1e-6)
    same = x.expand(2, 30, 7).contiguous()
    assert torch.allclose(F.spatial_aggregate(same, contrast=False, backend=backend), same, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_zero_is_the_identity(backend):
    x = torch.randn(1, 20, 8, requires_grad=True)
    out = F.spatial_aggregate(x, alpha=0.0, backend=backend)
    assert torch.allclose(out, x, atol=1e-7)
    assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cosine", "kl"])
def test_gradcheck(backend, kind):
    x = rows(1, 6, 4, 3, kind).requires_grad_()

    def run(x):
        return F.spatial_aggregate(x, similarity=kind, contrast=False, backend=backend)

    assert torch.autograd.gradcheck(run, (x,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 60), c=st.integers(1, 40), seed=st.integers(0, 50), alpha=st.floats(0, 1))
def test_aggregated_probabilities_are_probabilities(backend, n, c, seed, alpha):
    p = rows(2, n, c, seed, "kl").float()
    out = F.spatial_aggregate(p, alpha=alpha, similarity="kl", contrast=False, backend=backend)
    assert (out >= -1e-7).all() and (out.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_two_bitwise_equal_runs(backend):
    x = torch.randn(2, 32, 90).transpose(1, 2)
    one, two = F.spatial_aggregate(x, backend=backend), F.spatial_aggregate(x, backend=backend)
    assert torch.equal(one, two)
    assert torch.allclose(one, F.spatial_aggregate(x.contiguous(), backend=backend), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_without_direction_only_passes_its_values_on(backend):
    x = torch.randn(2, 30, 16)
    x[:, 7] = 0
    x.requires_grad_()
    out = F.spatial_aggregate(x, backend=backend)
    grad = torch.autograd.grad(out.square().sum(), x)[0]
    assert torch.isfinite(out).all() and grad.abs().max() < 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cosine", "kl"])
def test_equal_similarities_weigh_all_pixels_alike(backend, dtype, kind):
    """One direction of many lengths, or one distribution: rounding is not taken for contrast."""
    x = rows(1, 1, 7, kind=kind).repeat(1, 300, 1)
    if kind == "cosine":
        x = x * torch.linspace(0.5, 2, 300, dtype=torch.float64)[:, None]
    x = x.to(dtype).requires_grad_()
    out = F.spatial_aggregate(x, alpha=1.0, similarity=kind, backend=backend)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)
    out.backward(grad)
    exact, plain = x.detach().double(), grad.double()
    if dtype in (torch.float64, torch.float32) or kind == "kl":  # rounded lengths leave one direction
        assert torch.allclose(out.detach().double(), exact.mean(1, keepdim=True), rtol=1e-2)
    assert x.grad.isfinite().all() and x.grad.abs().max() <= 10 * plain.abs().max() * exact.abs().max() ** 2
