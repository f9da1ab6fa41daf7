"""The methods' losses and statistics: the authors' values, literal oracles, gradients, hard cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends

AFFINITY = cpu_backends("local_affinity")

# ASANet


@pytest.mark.parametrize("backend", AFFINITY)
@pytest.mark.parametrize(("neighbours", "east", "west"), [(8, 4, 3), (4, 2, 1)])
def test_affinity_values_of_the_notes(neighbours, east, west, backend):
    p = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]], dtype=torch.float64)
    a = F.local_affinity(p, neighbours=neighbours, backend=backend)
    assert a.shape == (1, 2 * neighbours, 1, 2)
    found = a[0, :, 0]
    assert found[2 * east].tolist() == pytest.approx([1.435691, 0.110651], abs=1e-6)
    assert found[2 * west].tolist() == pytest.approx([0.036610, 0.001283], abs=1e-6)
    assert found[2 * east + 1].tolist() == pytest.approx([0.002369, 0.068791], abs=1e-6)
    assert found[2 * west + 1].tolist() == pytest.approx([0.071331, 1.219765], abs=1e-6)
    if neighbours == 8:
        assert F.affinity_cleaning_loss(p.log(), backend=backend).item() == pytest.approx(0.43375, abs=1e-6)


def test_affinity_of_the_uniform_distribution():
    p = torch.full((1, 19, 4, 5), 1 / 19, dtype=torch.float64)
    assert torch.allclose(F.local_affinity(p), torch.tensor(0.042995, dtype=torch.float64), atol=1e-6)
    assert F.affinity_cleaning_loss(p).item() == pytest.approx(1 - 1 / 19)


def literal_affinity(p, neighbours, distance, kind):
    offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    offsets = [(y, x) for y, x in offsets if neighbours == 8 or y * x == 0]
    height, width = p.shape[2:]
    out = []
    for y, x in offsets:
        rows = (torch.arange(height) + y * distance).clamp(0, height - 1)
        columns = (torch.arange(width) + x * distance).clamp(0, width - 1)
        q = p * p[:, :, rows][:, :, :, columns]
        if kind == "product":
            out.append(q.sum(1))
            continue
        clamp = lambda v: v.clamp(1e-4, 1)  # noqa: E731
        out.append(
            clamp(q) * (clamp(q) / clamp(p)).log() + clamp(1 - q) * (clamp(1 - q) / clamp(1 - p)).log()
        )
    return torch.stack(out, 1).flatten(1, -3 if kind == "kl" else 1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.sampled_from([4, 8]),
    st.integers(1, 3), st.sampled_from(["kl", "product"]), st.integers(0, 99),
)  # fmt: skip
def test_affinity_is_the_definition(batch, classes, height, width, neighbours, distance, kind, seed):
    for backend in AFFINITY:
        affinity_case(batch, classes, height, width, neighbours, distance, kind, seed, backend.values[0])


def affinity_case(batch, classes, height, width, neighbours, distance, kind, seed, backend):
    generator = torch.Generator().manual_seed(seed)
    p = (4 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)).softmax(1)
    p.requires_grad_()
    found = F.local_affinity(p, neighbours=neighbours, distance=distance, kind=kind, backend=backend)
    wanted = literal_affinity(p, neighbours, distance, kind)
    assert torch.allclose(found, wanted, atol=1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    one, two = (torch.autograd.grad((x * weight).sum(), p, retain_graph=True)[0] for x in (found, wanted))
    assert torch.allclose(one, two, atol=1e-9)


@pytest.mark.parametrize("backend", AFFINITY)
@pytest.mark.parametrize("kind", ["kl", "product"])
@pytest.mark.parametrize(("neighbours", "distance"), [(8, 1), (4, 3), (8, 20), (4, 50)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_affinity_of_many_rows(backend, kind, neighbours, distance, layout):
    generator = torch.Generator().manual_seed(0)
    p = (4 * torch.randn(2, 5, 53, 21, generator=generator)).softmax(1).requires_grad_()
    options = dict(neighbours=neighbours, distance=distance, kind=kind)
    found = F.local_affinity(p, **options, backend=backend)
    weight = torch.randn(found.shape, generator=generator).contiguous(memory_format=layout)
    truth = p.detach().double().requires_grad_()
    wanted = F.local_affinity(truth, **options, backend="reference")
    assert torch.allclose(found, wanted.float(), atol=1e-5)
    (one,) = torch.autograd.grad(found, p, weight)
    (two,) = torch.autograd.grad(wanted, truth, weight.double())
    assert torch.allclose(one.double(), two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", AFFINITY)
def test_cleaning_gradient(backend):
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: F.affinity_cleaning_loss(z, neighbours=4, backend=backend), z)
    one, two = (F.affinity_cleaning_loss(z, backend=name) for name in (backend, "reference"))
    assert one.item() == pytest.approx(two.item(), abs=1e-12)


@pytest.mark.parametrize("backend", AFFINITY)
def test_clamped_entries_have_no_gradient(backend):
    p = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]], dtype=torch.float64, requires_grad=True)
    a = F.local_affinity(p, backend=backend)
    assert torch.isfinite(a).all() and a.max() < 9.2104
    # class 0 of pixel 0 towards its right neighbour: q = 0 and 1 - p = 0 are both clamped
    assert a[0, 2 * 4, 0, 0].item() == pytest.approx(9.2094, abs=1e-3)
    assert torch.isfinite(torch.autograd.grad(a.sum(), p)[0]).all()


# SePiCo


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 40), st.integers(0, 99))
def test_statistics_are_exact_and_merge_exactly(n, width, classes, split, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64) + 3
    labels = torch.randint(0, classes + 1, (n,), generator=generator)
    labels[labels == classes] = 255
    whole = F.class_statistics(x, labels, classes)
    for c in range(classes):
        rows = x[labels == c]
        assert whole.count[c] == len(rows)
        mean = rows.mean(0) if len(rows) else torch.zeros(width, dtype=torch.float64)
        variance = rows.var(0, unbiased=False) if len(rows) else torch.zeros(width, dtype=torch.float64)
        assert torch.allclose(whole.mean[c], mean) and torch.allclose(whole.variance[c], variance, atol=1e-12)
    parts = [
        F.class_statistics(a, b, classes)
        for a, b in ((x[:split], labels[:split]), (x[split:], labels[split:]))
    ]
    merged = parts[0].merge(parts[1])
    for one, two in zip(vars(merged).values(), vars(whole).values(), strict=True):
        assert torch.allclose(one, two, atol=1e-10)


def test_statistics_survive_a_large_common_mean():
    x = torch.randn(500, 8) * 0.01 + 100
    found = F.class_statistics(x, torch.zeros(500, dtype=torch.int64), 1)
    assert torch.allclose(found.variance[0], x.double().var(0, unbiased=False).float(), rtol=1e-3)
