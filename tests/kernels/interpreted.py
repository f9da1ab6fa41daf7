"""Every kernel in Triton's interpreter against float64. Not collected by itself:
tests/kernels/test_kernels.py
runs it in a process of its own, since the interpreter is chosen when triton is imported.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py
"""

from __future__ import annotations

import math

import pytest
import torch

import fastuda.ops as F
from fastuda.kernels import _aggregate_symmetric, _moments, _narrow, _panels, _search, _temperature
from fastuda.kernels import cycle_association_loss as association
from fastuda.kernels._common import add_product, prepare, product
from fastuda.ops._reference import pair_similarity, row_temperature
from fastuda.ops.cycle_match import reference as plain_match
from tests.helpers import as_good_match

BAND = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""One rounding, as a share of the norm (the scale of float32 accumulation for float32)."""


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pixels(batch, n, channels, similarity, dtype, seed=0):
    """Positive features with a gain per pixel, or probabilities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, n, channels, generator=generator)
    if similarity == "kl":
        return (x * 5).softmax(-1).to(dtype)
    return (x * (torch.rand(batch, n, 1, generator=generator) + 0.1)).to(dtype)


def leaf(x, dtype):
    return x.detach().to(dtype, copy=True).requires_grad_()


def distance(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()


def assert_within_budget(ours, plain, truth, dtype):
    """At most twice the error of plain torch in the same dtype, plus one rounding."""
    for name, x, p, t in zip(("loss or output", "gradient", "gradient"), ours, plain, truth, strict=False):
        assert x.isfinite().all(), name
        assert distance(x, t) <= 2 * distance(p, t) + BAND[dtype], name


def run_association(source, target, labels, similarity, backend, dtype, contrast=True):
    s = leaf(source, dtype)
    t = leaf(target, dtype)
    loss, stats = F.cycle_association_loss(
        s, t, labels, similarity=similarity, contrast=contrast, backend=backend
    )
    loss.backward()
    return (loss.detach(), s.grad, t.grad), stats


def check_association(source, target, labels, similarity, contrast=True, backend="triton"):
    dtype = source.dtype
    ours, stats = run_association(source, target, labels, similarity, backend, dtype, contrast)
    plain, _ = run_association(source, target, labels, similarity, "reference", dtype, contrast)
    truth, want = run_association(source, target, labels, similarity, "reference", torch.float64, contrast)
    sim = pair_similarity(source.double(), target.double(), similarity)
    reached = sim.gather(2, stats.forward_index[..., None])[..., 0]
    assert (sim.amax(2) - reached).max() < 1e-6
    assert stats.matched == want.matched
    assert_within_budget(ours, plain, truth, dtype)
    assert ours[1].dtype == ours[2].dtype == dtype


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_association(similarity, dtype):
    source = pixels(2, 97, 19, similarity, dtype)
    target = pixels(2, 130, 19, similarity, dtype, seed=1)
    labels = torch.randint(0, 3, (2, 97))
    labels[:, ::5] = 255
    check_association(source, target, labels, similarity)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 63), (63, 1), (65, 63)])
def test_association_of_odd_sizes(similarity, n, m):
    source = pixels(1, n, 5, similarity, torch.float32)
    target = pixels(1, m, 5, similarity, torch.float32, seed=1)
    check_association(source, target, torch.zeros(1, n, dtype=torch.long), similarity, contrast=m > 1 < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_association_with_wide_channels_takes_the_tile_pass(dtype):
    assert not _temperature.covariance_pays(150, 100, dtype)
    source = pixels(1, 70, 150, "cosine", dtype)
    target = pixels(1, 140, 150, "cosine", dtype, seed=1)
    check_association(source, target, torch.randint(0, 2, (1, 70)), "cosine")


def test_association_in_many_panels_and_chunks(monkeypatch):
    """Panels of one block, chunks of one row block, and programs that walk over several column tiles."""
    monkeypatch.setattr(_panels, "PANEL_BYTES", 1)
    monkeypatch.setattr(_search, "PANEL_BYTES", 1)
    monkeypatch.setattr(_search, "PROGRAMS", 1)
    source = pixels(1, 150, 9, "cosine", torch.float32)
    target = pixels(1, 300, 9, "cosine", torch.float32, seed=1)
    check_association(source, target, torch.randint(0, 3, (1, 150)), "cosine")
    wide = _narrow.WIDEST + 3
    source, target = (pixels(1, n, wide, "kl", torch.float32, seed=n) for n in (150, 300))
    check_association(source, target, torch.randint(0, 3, (1, 150)), "kl")


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_association_without_a_match_has_zero_gradients(similarity):
    source, target = (pixels(1, 20, 4, similarity, torch.float32, seed=i) for i in (0, 1))
    labels = torch.full((1, 20), 255)
    (loss, *grads), stats = run_association(source, target, labels, similarity, "triton", torch.float32)
    assert loss == 0 and stats.matched == 0
    assert all((g == 0).all() for g in grads)


def test_vanishing_features_stay_finite():
    source, target = pixels(1, 40, 6, "cosine", torch.bfloat16), pixels(1, 50, 6, "cosine", torch.bfloat16)
    source[0, 3:7], target[0, ::9] = 0, 0
    residuals = association.cycle_association_loss_fwd(source, target, "cosine", True)
    assert all(x.isfinite().all() for x in residuals)
    x = source.clone().requires_grad_()
    F.spatial_aggregate(x, backend="triton").float().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_match_breaks_ties_downwards(similarity):
    """Equal up to the last bit in whatever order the interpreter's products add: few digits, or two terms."""
    width = 7 if similarity == "cosine" else 2
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(1, 9, (1, n, width), generator=generator).float() for n in (70, 75))
    if similarity == "kl":
        source, target = 2.0**-source, 2.0**-target
    source, target = source.repeat(1, 2, 1), target.repeat(1, 4, 1)
    ours = F.cycle_match(source, target, similarity=similarity, backend="triton")
    assert ours.forward_index.max() < 75 and ours.backward_index.max() < 70
    plain = plain_match(source.double(), target.double(), similarity)
    for x, want in zip(ours[2:], plain[2:], strict=True):
        torch.testing.assert_close(x.double(), want, rtol=0, atol=3e-6)


def test_strided_input_is_the_same():
    source = pixels(2, 33, 8, "cosine", torch.float32)
    strided = source.transpose(1, 2).contiguous().transpose(1, 2)
    one = F.cycle_match(source, source, backend="triton")
    two = F.cycle_match(strided, strided, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(
        F.spatial_aggregate(source, backend="triton"), F.spatial_aggregate(strided, backend="triton")
    )


def run_aggregate(x, grad, similarity, contrast, backend, dtype):
    x = leaf(x, dtype)
    out = F.spatial_aggregate(x, alpha=0.7, similarity=similarity, contrast=contrast, backend=backend)
    out.backward(grad.to(dtype))
    return out.detach(), x.grad


def check_aggregate(x, similarity, contrast=True, backend="triton"):
    grad = torch.randn(x.shape).to(x.dtype)
    runs = [(backend, x.dtype), ("reference", x.dtype), ("reference", torch.float64)]
    assert_within_budget(*(run_aggregate(x, grad, similarity, contrast, *r) for r in runs), x.dtype)


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize(("similarity", "contrast"), [("cosine", True), ("kl", False), ("kl", True)])
def test_aggregate(similarity, contrast, dtype):
    check_aggregate(pixels(2, 97, 19, similarity, dtype), similarity, contrast)


@pytest.mark.parametrize("n", [1, 2, 63, 130])
def test_aggregate_of_odd_sizes(n):
    check_aggregate(pixels(1, n, 40, "cosine", torch.float32), "cosine", contrast=n > 2)
    check_aggregate(pixels(1, n, 16, "kl", torch.float32), "kl", contrast=False)


@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_aggregate_in_many_panels(similarity, monkeypatch):
    monkeypatch.setattr(_panels, "PANEL_BYTES", 1)
    channels = 6 if similarity == "cosine" else _narrow.WIDEST + 3
    check_aggregate(pixels(1, 200, channels, similarity, torch.float32), similarity)


@pytest.mark.parametrize(("backend", "products"), [("triton", 2.0), ("library", 3.5)])
def test_aggregate_works_on_a_pair_of_pixels_once(backend, products, monkeypatch):
    """What the library multiplies in the gradient, in products of the image with itself; a block with itself
    counts whole."""
    n, blocks = 384, 3
    x = pixels(1, n, 512, "cosine", torch.float32)
    monkeypatch.setattr(_panels, "PANEL_BYTES", 1)
    out = F.spatial_aggregate(x.requires_grad_(), backend=backend)
    multiplied = []

    def counted(function):
        def call(*matrices):
            a, b = matrices[:2] if function is product else matrices[1:]
            multiplied.append(a.shape[0] * a.shape[1] * b.shape[1])
            return function(*matrices)

        return call

    for function in (product, add_product):
        monkeypatch.setattr(_aggregate_symmetric, function.__name__, counted(function))
    out.sum().backward()
    assert sum(multiplied) / (n * n * 512) == pytest.approx(products + (0.5 / blocks if products > 2 else 0))


@pytest.mark.parametrize("n", [1, 8464, 16836, 32768])
@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("library", [False, True])
def test_a_pair_of_blocks_stays_within_the_panels_memory(n, dtype, library):
    scratch = _aggregate_symmetric.Blocks(torch.empty(n, 512, dtype=dtype, device="meta"), library)
    held = sum(x.nbytes for x in (scratch.memory, scratch.products, scratch.sums))
    assert held <= 1.05 * (1 + library) * _panels.PANEL_BYTES
    assert len(scratch.parts(n)) == -(-n // scratch.size) <= 1 + n / (0.8 * scratch.most(scratch.memory))


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("channels", [7, 80])
def test_aggregate_of_one_colour_returns_it(dtype, similarity, channels):
    """All similarities are equal: rounding is not taken for contrast."""
    x = torch.linspace(-1, 1, channels)
    x = (x.softmax(0) if similarity == "kl" else x).to(dtype).repeat(1, 70, 1).requires_grad_()
    out = F.spatial_aggregate(x, similarity=similarity, backend="triton")
    torch.testing.assert_close(out.detach(), x.detach())
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype))
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1000


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
@pytest.mark.parametrize("channels", [7, 80])
def test_association_of_one_colour_has_a_uniform_softmax(dtype, similarity, channels):
    colours = torch.randn(2, 1, 1, channels)
    colours = (colours.softmax(-1) if similarity == "kl" else colours).to(dtype)
    source, target = (x.repeat(1, n, 1).requires_grad_() for x, n in zip(colours, (70, 40), strict=True))
    labels = torch.zeros(1, 70, dtype=torch.long)
    loss, _ = F.cycle_association_loss(source, target, labels, similarity=similarity, backend="triton")
    loss.backward()
    assert loss.item() == pytest.approx(math.log(70) + math.log(40), rel=1e-5)
    for grad in (source.grad, target.grad):
        assert grad.isfinite().all() and grad.abs().max() < 1000


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("shape", [(5, 1), (3, 2), (70, 63), (2, 3, 97), (3, 1024), (2, 2500)])
def test_contrast_softmax(shape, dtype):
    x = (torch.rand(shape) + 5 * torch.rand(*shape[:-1], 1)).to(dtype)
    grad = torch.randn(shape).to(dtype)

    def run(backend, work):
        y = leaf(x, work)
        out = F.contrast_softmax(y, backend=backend)
        out.backward(grad.to(work))
        return out.detach(), y.grad

    truth = run("reference", torch.float64)
    ours = run("triton", dtype)
    if shape[-1] == 1:
        assert (ours[0] == 1).all() and ours[1].abs().max() < 1e-6
    else:
        assert_within_budget(ours, run("reference", dtype), truth, dtype)


def test_forward_of_one_backend_fits_the_backward_of_another():
    """Residuals are part of the schema: here the Triton backward on residuals computed by hand."""
    source, target = (pixels(1, 30, 4, "cosine", torch.float32, seed=i).double() for i in (0, 1))
    source.requires_grad_()
    target.requires_grad_()
    sim = pair_similarity(source, target, "cosine")
    weights = torch.rand(1, 30), torch.rand(1, 30)
    residuals, total = [], 0
    for s, w in ((sim, weights[0]), (sim.transpose(1, 2), weights[1])):
        t = row_temperature(s)[..., 0]
        index = s.argmax(-1)
        lse = (s / t[..., None]).logsumexp(-1)
        total = total + (w * (lse - s.gather(-1, index[..., None])[..., 0] / t)).sum()
        residuals.append((index, t.detach(), lse.detach()))
    total.backward()
    (fi, st, sl), (bi, tt, tl) = residuals
    args = [x.detach().float() for x in (source, target)]
    grads = association.cycle_association_loss_bwd(
        *args, *weights, fi, bi, st.float(), tt.float(), sl.float(), tl.float(), "cosine"
    )
    torch.testing.assert_close(grads[0].double(), source.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1].double(), target.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("similarity", ["cosine", "kl"])
def test_products_by_the_library(similarity, dtype, monkeypatch):
    """The same ops where the library multiplies into panels: in several panels of several blocks."""
    for module in (_panels, _search, _moments, _temperature):
        monkeypatch.setattr(module, "PANEL_BYTES", 64 * 4 * 320)
    source = pixels(2, 150, 512, similarity, dtype)
    target = pixels(2, 300, 512, similarity, dtype, seed=1)
    labels = torch.randint(0, 3, (2, 150))
    labels[:, ::5] = 255
    check_association(source, target, labels, similarity, backend="library")
    match = F.cycle_match(source, target, similarity=similarity, backend="library")
    exact = pair_similarity(source.double(), target.double(), similarity)
    as_good_match(match.forward_index, exact, 1e-5)
    if similarity == "cosine":
        as_good_match(match.backward_index, exact.mT, 1e-5)
    check_aggregate(target, similarity, similarity == "cosine", backend="library")


def test_the_library_is_for_wide_features():
    x = pixels(1, 20, 64, "cosine", torch.float32)
    reasons = {row.name: row.reason for row in F.backends("spatial_aggregate", x)}
    assert reasons["library"] == "takes at least 512 channels, not 64" and reasons["triton"] == "usable"
    with pytest.raises(ValueError, match="at least 512 channels"):
        F.spatial_aggregate(x, backend="library")


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 2.0**12])
@pytest.mark.parametrize("op", ["association", "aggregation"])
def test_float16_panels_hold_gradients_of_any_scale(op, scale):
    """Their common scale is a power of two of the largest slope; a vanishing feature has no say in it."""
    x, y = (pixels(1, n, 40, "cosine", torch.float16, seed=n) * scale for n in (70, 80))
    x[0, 3] = 0
    labels = torch.zeros(1, 70, dtype=torch.long)

    def run(backend, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        if op == "association":
            value, _ = F.cycle_association_loss(leaf, y.to(dtype), labels, backend=backend)
        else:
            value = (F.spatial_aggregate(leaf, backend=backend) / scale).square().sum()
        rows = torch.arange(70) != 3
        return torch.autograd.grad(value, leaf)[0][:, rows]

    found, truth = run("triton", torch.float16), run("reference", torch.float64)
    assert found.isfinite().all()
    assert distance(found, truth) < (2e-3 if scale < 4000 else 0.1)  # 4096 takes it near float16's end


def test_moments_in_chunks_are_those_of_one(monkeypatch):
    """The partial results stay within the budget of a panel, however many pixels there are."""
    source, target = (
        prepare(pixels(2, n, 150, "cosine", torch.float32, seed=n), "cosine") for n in (200, 300)
    )
    whole = [*_moments.tile_temperatures(source, target), *_moments.tile_temperatures(target, None)]
    for budget in (1, 1 << 18):
        monkeypatch.setattr(_moments, "PANEL_BYTES", budget)
        chunked = [*_moments.tile_temperatures(source, target), *_moments.tile_temperatures(target, None)]
        for one, other in zip(whole, chunked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_a_walk_in_one_span_is_one_in_many(monkeypatch):
    """Of narrow features: programs that own a block share the walk over the others."""
    source, target = (pixels(2, n, 19, "kl", torch.float32, seed=n) for n in (97, 300))
    labels = torch.randint(0, 3, (2, 97))
    for programs in (1, 10**6):
        monkeypatch.setattr(_narrow, "PROGRAMS", programs)
        assert (_narrow.Walk(300, 300, 19).splits == 1) == (programs == 1)
        check_association(source, target, labels, "kl")
        check_aggregate(target, "kl", contrast=False)
