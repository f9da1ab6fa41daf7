"""Values at the edge of their type: NaN shows in every loss, infinite logits mask a class, a common shift of
large ones is not seen."""

import math

import numpy as np
import pytest
import torch

import fastuda.ops as F
from tests.cases import every
from tests.helpers import cpu_backends

QUIET, GPU = 0x7FC00000, 0x7FFFFFFF
"""Bits of the NaN that a CPU makes, and of the one that a GPU does."""


def labels(*shape):
    return torch.arange(math.prod(shape)).reshape(shape) % 3


CASES = [
    pytest.param(*rest, backend.values[0], id="-".join(filter(None, (op, variant, backend.values[0]))))
    for op, variant, *rest in every("hard")
    for backend in cpu_backends(op)
]


@pytest.mark.parametrize("bits", [QUIET, GPU], ids=["quiet", "gpu"])
@pytest.mark.parametrize(("shape", "function", "backend"), CASES)
def test_a_nan_shows(shape, function, backend, bits):
    x = torch.randn(shape)
    assert function(x, backend).isfinite()
    x.flatten()[0] = torch.from_numpy(np.array([bits], dtype=np.uint32).view(np.float32))[0]
    assert function(x, backend).isnan()


@pytest.mark.parametrize("backend", cpu_backends("upsample_confusion"))
def test_a_class_at_minus_infinity_is_not_predicted(backend):
    x = torch.randn(1, 4, 5, 5)
    truth = torch.zeros(1, 11, 11, dtype=torch.int64)
    masked = x.index_fill(1, torch.tensor([0, 2]), -torch.inf)
    left = F.upsample_confusion(x[:, [1, 3]], truth, backend=backend)
    found = F.upsample_confusion(masked, truth, backend=backend)
    assert torch.equal(found[0], torch.stack([left[0, 0] * 0, left[0, 0], left[0, 0] * 0, left[0, 1]]))


@pytest.mark.parametrize("backend", cpu_backends("upsample_cross_entropy"))
def test_a_class_at_minus_infinity_has_no_share_of_the_loss(backend):
    x = torch.randn(1, 3, 5, 5).requires_grad_()
    truth = labels(1, 5, 5) % 2 * 2
    kept = torch.where(torch.arange(3)[None, :, None, None] == 1, -torch.inf, x)
    loss = F.upsample_cross_entropy(kept, truth, backend=backend)
    two = F.upsample_cross_entropy(x[:, [0, 2]], truth // 2, backend=backend)
    assert loss.item() == pytest.approx(two.item(), rel=1e-6)
    grad = torch.autograd.grad(loss, x)[0]
    assert torch.allclose(grad, torch.autograd.grad(two, x)[0], atol=1e-7)


@pytest.mark.parametrize("backend", cpu_backends("upsample_cross_entropy"))
def test_a_loss_beyond_its_type_is_infinite(backend):
    x = torch.randn(1, 3, 4, 4)
    x[:, 0, 0, 0] = -torch.inf
    loss = F.upsample_cross_entropy(x, torch.zeros(1, 8, 8).long(), reduction="sum", backend=backend)
    assert loss.item() > 1e38


@pytest.mark.parametrize("backend", cpu_backends("smooth_max_pool"))
def test_the_smooth_maximum_of_infinity_is_infinite(backend):
    x = torch.randn(1, 2, 40, 40)
    x[0, 0, 3, 5] = torch.inf
    found = F.smooth_max_pool(x, backend=backend)[0]
    assert found[0] == torch.inf and found[1].isfinite()


@pytest.mark.parametrize("backend", cpu_backends("category_pool"))
@pytest.mark.parametrize("shift", [300.0, 30000.0])
def test_category_pool_does_not_see_a_shift_of_its_logits(backend, shift):
    """Quarters, which are exact beside the shift."""
    features, logits = torch.randn(1, 700, 5).requires_grad_(), torch.randint(-8, 8, (1, 700, 3)) / 4
    logits.requires_grad_()

    def run(z):
        out = F.category_pool(features, z, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), (features, logits))

    for found, plain in zip(run(logits + shift), run(logits), strict=True):
        assert torch.allclose(found, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", cpu_backends("lovasz_softmax"))
def test_lovasz_takes_minus_zero_for_zero(backend):
    truth = torch.tensor([[[0, 0, 1, 1]]])
    p = torch.tensor([[[[1.0, 0.75, 0.0, 0.25]], [[0.0, 0.25, 1.0, 0.75]]]])
    minus = p.clone()
    minus[0, 0, 0, 2] = -0.0
    found, plain = (F.lovasz_softmax(x, truth, backend=backend).item() for x in (minus, p))
    assert found == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("op", ["cycle_association_loss", "spatial_aggregate"])
def test_bfloat16_runs_with_onednn_off_and_on(op):
    """Where the matrix unit was found usable before, too."""
    call = {
        "cycle_association_loss": lambda x: F.cycle_association_loss(x, x.detach() + 1, labels(1, 90))[0],
        "spatial_aggregate": lambda x: F.spatial_aggregate(x).float().square().sum(),
    }[op]
    x = torch.randn(1, 90, 64).bfloat16().requires_grad_()

    def run():
        value = call(x)
        return value.detach(), torch.autograd.grad(value, x)[0].float()

    before = run()
    with torch.backends.mkldnn.flags(enabled=False):
        found = run()
    for one, other in zip(before, found, strict=True):
        assert torch.allclose(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


def test_a_variance_that_is_written_over_is_found():
    statistics = F.ClassStatistics(torch.ones(3), torch.rand(3, 5), torch.rand(3, 5))
    x = torch.randn(9, 5).requires_grad_()
    loss = F.prototype_contrast(x, labels(9), statistics, kind="dist")
    statistics.variance.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_is_written_over_is_found():
    x, weight = torch.randn(1, 3, 4, 4).requires_grad_(), torch.rand(1, 8, 8)
    loss = F.upsample_cross_entropy(x, labels(1, 8, 8), pixel_weight=weight, reduction="none")
    weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
