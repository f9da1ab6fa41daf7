"""prototype_contrast: the authors' values, a literal transcription, and every backend's error."""

import math

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from fastuda.ops import ClassStatistics, PrototypeBank
from tests.helpers import cpu_backends, within_budget
from tests.oracles.prototype_contrast import published_bank, published_query, published_statistics

BACKENDS = cpu_backends("prototype_contrast")
KINDS = ["proto", "dist", "bank"]


def test_statistics_of_the_authors_code():
    total = published_statistics()
    assert total.mean.sum(1).tolist() == pytest.approx(
        [2.0550107514, 1.9465173752, 1.9668694714, 0], abs=2e-10
    )
    assert total.variance.sum(1).tolist() == pytest.approx(
        [0.1410395949, 0.2132349821, 0.2126018575, 0], abs=2e-10
    )
    assert total.count.tolist() == [13, 7, 8, 0]


AUTHORS = [
    ("proto", 100.0, 1.3840635515, 0.00079121, (-0.00003338, 0, -0.00003335)),
    ("dist", 100.0, 1.3840649756, 0.00079049, (-0.00003334, 0, -0.00003325)),
    ("bank", 100.0, 1.3840306043, 0.00078018, (-0.00004742, 0, -0.00004740)),
    ("proto", 0.1, 0.9886927341, 0.35819906, (0.03877491, 0, 0.04885309)),
    ("dist", 0.1, 2.8536846627, 1.21165491, (0.10350979, 0, 0.19738545)),
    ("bank", 0.1, 0.9915346950, 0.33799581, (0.02832650, 0, 0.03570002)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "tau", "loss", "norm", "first"), AUTHORS)
def test_values_of_the_authors_code(kind, tau, loss, norm, first, backend):
    q, rows, labels = published_query()
    prototypes = published_bank() if kind == "bank" else published_statistics()
    found = F.prototype_contrast(rows, labels, prototypes, kind=kind, tau=tau, backend=backend)
    grad = torch.autograd.grad(found, q)[0]
    assert abs(found.item() - loss) < 1e-8
    assert grad.norm().item() == pytest.approx(norm, abs=2e-8)
    assert grad.flatten()[:3].tolist() == pytest.approx(first, abs=2e-8)


def literal(q, labels, prototypes, kind, tau):
    """The published sums, one pixel and one class at a time."""
    terms = []
    for x, y in zip(q, labels.tolist(), strict=True):
        if y == 255:
            continue
        if kind == "bank":
            banks = [v[:n] for v, n in zip(prototypes.vectors, prototypes.count.tolist(), strict=True)]
            others = [(x @ (b.sum(0) / max(len(b), 1)) / tau).exp() for k, b in enumerate(banks) if k != y]
            own = [(x @ b / tau).exp() for b in banks[y]]
            terms.append(sum(-(e / (e + sum(others))).log() for e in own) / max(len(own), 1) + 0 * x.sum())
            continue
        z = [x @ m / tau for m in prototypes.mean]
        spread = [(x.square() * s).sum() / (2 * tau**2) for s in prototypes.variance]
        if kind == "dist":
            z = [a + b for a, b in zip(z, spread, strict=True)]
        terms.append(-z[y] + torch.stack(z).logsumexp(0) + (spread[y] if kind == "dist" else 0))
    return torch.stack(terms).mean() if terms else q.sum() * 0


def case(kind, n, width, classes, seed=0, length=4):
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return nnf.normalize(torch.rand(*shape, generator=generator, dtype=torch.float64), dim=-1)

    labels = torch.randint(0, classes + 1, (n,), generator=generator)
    labels[labels == classes] = 255
    if kind == "bank":
        count = torch.randint(0, length + 1, (classes,), generator=generator)
        return unit(n, width), labels, PrototypeBank(unit(classes, length, width), count)
    variance = 0.1 * torch.rand(classes, width, generator=generator, dtype=torch.float64)
    return unit(n, width), labels, ClassStatistics(torch.ones(classes), unit(classes, width), variance)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(0, 70), st.integers(1, 40), st.integers(1, 6), st.integers(0, 50),
    st.sampled_from([0.1, 1.0, 100.0]),
)  # fmt: skip
def test_any_size_is_the_definition(backend, kind, n, width, classes, seed, tau):
    q, labels, prototypes = case(kind, n, width, classes, seed)
    if kind == "bank" and classes == 1:
        return  # no other class to tell apart
    q.requires_grad_()
    found = F.prototype_contrast(q, labels, prototypes, kind=kind, tau=tau, backend=backend)
    wanted = literal(q, labels, prototypes, kind, tau)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-10)
    one, two = (torch.autograd.grad(x, q)[0] for x in (found, wanted))
    assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.1, 100.0])
def test_error_budget(backend, dtype, kind, tau):
    q, labels, prototypes = case(kind, 333, 300, 19, length=40)
    q = q.to(dtype)
    if kind == "bank":
        low = PrototypeBank(prototypes.vectors.float(), prototypes.count)
        high = PrototypeBank(low.vectors.double(), low.count)
    else:
        low = ClassStatistics(prototypes.count, prototypes.mean.float(), prototypes.variance.float())
        high = ClassStatistics(low.count, low.mean.double(), low.variance.double())

    def run(x, given, name):
        leaf = x.clone().requires_grad_()
        loss = F.prototype_contrast(leaf, labels, given, kind=kind, tau=tau, backend=name)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    found, plain = run(q, low, backend), run(q, low, "reference")
    truth = run(q.double(), high, "reference")
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for name, work, *three in zip(
        ("loss", "gradient"), (torch.float32, dtype), found, plain, truth, strict=True
    ):
        within_budget(*three, name, work)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_labelled_pixel_it_is_zero(kind, backend):
    q = torch.full((6, 5), torch.nan, requires_grad=True)
    prototypes = published_bank() if kind == "bank" else published_statistics()
    loss = F.prototype_contrast(q, torch.full((6,), 255), prototypes, kind=kind, backend=backend)
    grad = torch.autograd.grad(loss, q)[0]
    if backend != "reference":  # which multiplies an empty selection
        assert loss.item() == 0 and grad.abs().max() == 0
    q = torch.randn(0, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = F.prototype_contrast(q, none, prototypes, kind=kind, backend=backend)
    assert loss.item() == 0 and torch.autograd.grad(loss, q)[0].shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_float32_logits(backend):
    _, rows, labels = published_query()
    low = F.prototype_contrast(
        rows.detach().bfloat16(), labels, published_statistics(), kind="proto", backend=backend
    )
    assert low.dtype == torch.float32
    assert abs(low.item() - 1.3840635515) < 2e-4  # a bfloat16 step near 1.38 is 8e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_tau_is_the_logarithm_of_the_classes(backend):
    _, rows, labels = published_query()
    loss = F.prototype_contrast(rows, labels, published_statistics(), tau=1e9, backend=backend)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-8)
