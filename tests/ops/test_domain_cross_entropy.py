"""domain_cross_entropy: the authors' values, the definition at full resolution, and every backend's error."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, wave

BACKENDS = cpu_backends("domain_cross_entropy")

AUTHORS = [
    ("source", 3.8487876064, 0.11870436, (-0.00992427, -0.00756508, -0.00469640)),
    ("target", 3.5921309632, 0.11281731, (0.00088071, 0.00450469, 0.00218701)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("encode", "loss", "norm", "first"), AUTHORS)
def test_values_of_the_authors_code(encode, loss, norm, first, backend):
    d = (3 * wave((2, 10, 4, 5), 0.41)).requires_grad_()
    z = (3 * 2 * wave((2, 5, 4, 5), 0.31)).requires_grad_()
    found = F.domain_cross_entropy(d, z, encode=encode, backend=backend)
    grad = torch.autograd.grad(found, d)[0]
    assert abs(found.item() - loss) < 1e-8
    assert grad.norm().item() == pytest.approx(norm, abs=2e-8)
    assert grad.flatten()[:3].tolist() == pytest.approx(first, abs=2e-8)


def literal(d, z, encode, size, align, temperature=1.8, clip=0.9, threshold=None):
    """The published formula at full resolution, zero half and all, in the dtype of d."""
    d, z = (nnf.interpolate(x, size, mode="bilinear", align_corners=align) for x in (d, z.to(d.dtype)))
    p = (z / temperature).softmax(1)
    a = p.clamp(max=clip)
    if threshold is not None:
        best, index = p.max(1)
        a = nnf.one_hot(index, p.shape[1]).movedim(-1, 1) * (best >= threshold)[:, None]
    halves = [a, torch.zeros_like(a)] if encode == "source" else [torch.zeros_like(a), a]
    return -(torch.cat(halves, 1) * d.log_softmax(1)).sum(1).mean()


def case(classes=3, batch=2, low=(3, 4), other=(5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    d = 3 * torch.randn(batch, 2 * classes, *low, generator=generator, dtype=torch.float64)
    z = 6 * torch.randn(batch, classes, *other, generator=generator, dtype=torch.float64)
    return d.requires_grad_(), z


SIZES = st.tuples(st.integers(1, 19), st.integers(1, 21))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(1, 6), low=SIZES, other=SIZES,
    size=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    align=st.booleans(), encode=st.sampled_from(["source", "target"]),
    threshold=st.sampled_from([None, 0.0, 0.6]), seed=st.integers(0, 50),
)  # fmt: skip
def test_any_size_is_the_definition(backend, classes, low, other, size, align, encode, threshold, seed):
    d, z = case(classes, 2, low, other, seed)
    wanted = literal(d, z, encode, size, align, threshold=threshold)
    found = F.domain_cross_entropy(
        d, z, encode=encode, size=size, align_corners=align, hard_threshold=threshold, backend=backend
    )
    assert found.item() == pytest.approx(wanted.item(), abs=1e-10)
    one, two = (torch.autograd.grad(x, d)[0] for x in (found, wanted))
    assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_no_clip_and_no_gradient(backend):
    d, z = case(4, 2, (6, 5), (6, 5))
    wanted = literal(d, z, "source", (6, 5), True, temperature=0.5, clip=1.0)
    turned = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (d, z))
    found = F.domain_cross_entropy(*turned, encode="source", temperature=0.5, clip=1.0, backend=backend)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-11)
    with torch.no_grad():
        assert (
            F.domain_cross_entropy(d, z, encode="source", temperature=0.5, clip=1.0, backend=backend) == found
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_segmentation_logits_get_no_gradient(backend):
    d, z = torch.randn(1, 6, 3, 4, requires_grad=True), torch.randn(1, 3, 3, 4, requires_grad=True)
    loss = F.domain_cross_entropy(d, z, encode="source", backend=backend)
    assert torch.autograd.grad(loss, z, allow_unused=True)[0] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    d, z = case(2, 1, (2, 3), (4, 3))
    assert torch.autograd.gradcheck(
        lambda d: F.domain_cross_entropy(d, z, encode="source", size=(6, 5), backend=backend), d
    )
