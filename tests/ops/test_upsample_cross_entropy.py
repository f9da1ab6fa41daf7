"""upsample_cross_entropy against torch's interpolate and cross_entropy."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends

BACKENDS = cpu_backends("upsample_cross_entropy")


def case(k=5, low=(6, 7), high=(21, 31), b=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(b, k, *low, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, k, (b, *high), generator=generator)
    labels[:, :3] = 255
    return logits, labels


def up(logits, size, align_corners=False):
    return nnf.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"class_weight": True}, {"temperature": 1.8}]
)
def test_hard_labels_as_torch(backend, align_corners, reduction, options):
    logits, labels = case()
    temperature = options.get("temperature", 1.0)
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if "class_weight" in options else None
    smoothing = options.get("label_smoothing", 0.0)
    wanted = nnf.cross_entropy(
        up(logits, labels.shape[1:], align_corners) / temperature,
        labels,
        weight,
        ignore_index=255,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    found = F.upsample_cross_entropy(
        logits,
        labels,
        align_corners=align_corners,
        temperature=temperature,
        class_weight=weight,
        label_smoothing=smoothing,
        reduction=reduction,
        backend=backend,
    )
    assert torch.allclose(found, wanted, atol=1e-10)
    scale = torch.rand_like(wanted)
    a, b = (torch.autograd.grad((x * scale).sum(), logits)[0] for x in (found, wanted))
    assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_labels_as_torch(backend):
    logits, _ = case()
    soft = torch.rand(2, 5, 21, 31, dtype=torch.float64).softmax(1)
    wanted = nnf.cross_entropy(up(logits, (21, 31)), soft)
    found = F.upsample_cross_entropy(logits, soft, backend=backend)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-10)
    a, b = (torch.autograd.grad(x, logits)[0] for x in (found, wanted))
    assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_weights_multiply_and_leave_the_divisor(backend):
    logits, labels = case()
    weight = torch.rand(2, 21, 31, dtype=torch.float64)
    pixelwise = nnf.cross_entropy(up(logits, (21, 31)), labels, ignore_index=255, reduction="none")
    found = F.upsample_cross_entropy(logits, labels, pixel_weight=weight, backend=backend)
    wanted = (pixelwise * weight).sum() / (labels != 255).sum()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_valid_pixel_gives_zero_not_nan(backend):
    logits, labels = case()
    loss = F.upsample_cross_entropy(logits, torch.full_like(labels, 255), backend=backend)
    assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 9),
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    high=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    align=st.booleans(),
    seed=st.integers(0, 50),
)
def test_any_size(backend, k, low, high, align, seed):
    logits, labels = case(k, low, high, 1, seed)
    found = F.upsample_cross_entropy(logits, labels, align_corners=align, reduction="sum", backend=backend)
    wanted = nnf.cross_entropy(up(logits, high, align), labels, ignore_index=255, reduction="sum")
    assert found.item() == pytest.approx(wanted.item(), abs=1e-8)
    a, b = (torch.autograd.grad(x, logits)[0] for x in (found, wanted))
    assert torch.allclose(a, b, atol=1e-8)


def test_bad_input_is_named():
    logits, labels = case()
    with pytest.raises(ValueError, match="reduction must be one of"):
        F.upsample_cross_entropy(logits, labels, reduction="avg")
    with pytest.raises(ValueError, match=r"class_weight must be \[5\]"):
        F.upsample_cross_entropy(logits, labels, class_weight=torch.ones(4))
    with pytest.raises(ValueError, match="soft labels must be"):
        F.upsample_cross_entropy(logits, torch.rand(2, 4, 21, 31))
