"""The CUDA kernels of upsampled losses without a GPU, with what the hardware's functions may be off by."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fastuda.ops.domain_cross_entropy import reference as plain_domain
from fastuda.ops.upsample_cross_entropy import reference as plain_entropy
from tests.helpers import at, within_budget


class UpsampleShape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "classes", "h", "w", "height", "width")),
        ("align_corners", ctypes.c_bool),
    )


class EntropyOptions(ctypes.Structure):
    _fields_ = (("sharpness", ctypes.c_float), ("smoothing", ctypes.c_float), ("ignore", ctypes.c_int64))


class DomainOptions(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("classes", "offset")),
        *((name, ctypes.c_int64) for name in ("seg_h", "seg_w")),
        *((name, ctypes.c_float) for name in ("sharpness", "level")),
        ("hard", ctypes.c_bool),
    )


SIZES = [
    ((1, 1), (1, 1)),
    ((1, 5), (7, 1)),
    ((3, 2), (11, 63)),
    ((9, 21), (13, 70)),
    ((12, 17), (5, 6)),
    ((3, 2), (30, 150)),
    ((6, 40), (50, 330)),
]
"""Logits and labels: one pixel, one column, more outputs than threads, several blocks a side, smaller."""


def partials(emulated, shape):
    emulated.fastuda_upsample_blocks.restype = ctypes.c_int64
    return torch.full((2 * emulated.fastuda_upsample_blocks(shape),), torch.nan, dtype=torch.float64)


def entropy(emulated, x, labels, *, align=False, temperature=1.0, ignore=255, smoothing=0.0, **weights):
    """Sum of the losses, sum of the weights, gradient, losses; and the sums without a gradient."""
    soft = labels.is_floating_point()
    shape = UpsampleShape(*x.shape, *labels.shape[-2:], align)
    options = EntropyOptions(1 / temperature, smoothing, ignore)
    results = []
    for wanted in (True, False):
        grad = torch.zeros_like(x) if wanted else None
        losses = torch.full((len(x), *labels.shape[-2:]), torch.nan) if wanted else None
        total, norm = torch.full((), torch.nan), torch.full((), torch.nan)
        labels_at = (None, at(labels)) if soft else (at(labels), None)
        weights_at = (at(weights.get("class_weight")), at(weights.get("pixel_weight")))
        written = (grad, losses, total, norm, partials(emulated, shape))
        failed = emulated.fastuda_upsample_cross_entropy(
            at(x), *labels_at, *weights_at, *map(at, written), shape, options, None
        )
        assert failed == 0
        results += [total, norm, grad, losses]
    torch.testing.assert_close(results[4:6], results[:2], rtol=1e-6, atol=0)
    return results[:4]


def check_entropy(emulated, x, labels, *, align=False, smoothing=0.0, temperature=1.0, **weights):
    ours = entropy(emulated, x, labels, align=align, smoothing=smoothing, temperature=temperature, **weights)

    def run(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        w = (weights.get("class_weight"), weights.get("pixel_weight"))
        w = [None if t is None else t.to(dtype) for t in w]
        rest = (align, temperature, 255, *w, smoothing, "none")
        losses = plain_entropy(leaf, labels, *rest)
        return losses.sum().detach(), losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    found = ours[0], ours[3], ours[2]
    plain, truth = run(torch.float32), run(torch.float64)
    for name, *three in zip(("sum", "losses", "gradient"), found, plain, truth, strict=True):
        within_budget(*three, name, torch.float32)
    return ours[1]


def labels_of(classes, *shape):
    labels = torch.randint(0, classes, shape)
    labels[torch.rand(shape) < 0.2] = 255
    return labels


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_cross_entropy_of_odd_sizes(emulated, low, high, align):
    torch.manual_seed(sum(high))
    x, labels = 3 * torch.randn(2, 5, *low), labels_of(5, 2, *high)
    assert check_entropy(emulated, x, labels, align=align) == (labels != 255).sum()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(class_weight=torch.linspace(0.5, 2, 19)),
        dict(pixel_weight=torch.linspace(0, 2, 2 * 9 * 13).reshape(2, 9, 13)),
        dict(smoothing=0.1, class_weight=torch.linspace(0.5, 2, 19)),
        dict(temperature=1.8),
        dict(temperature=0.5),
    ],
)
def test_cross_entropy_options(emulated, options, soft):
    torch.manual_seed(1)
    x, labels = 3 * torch.randn(2, 19, 5, 3), labels_of(19, 2, 9, 13)
    if soft:
        labels = torch.randn(2, 19, 9, 13).softmax(1)
    norm = check_entropy(emulated, x, labels, **options)
    weight = options.get("class_weight", torch.ones(19))
    valid = labels[labels != 255] if not soft else None
    assert norm.item() == pytest.approx(2 * 9 * 13 if soft else weight[valid].sum().item(), rel=1e-6)


def test_cross_entropy_of_many_classes_and_none_valid(emulated):
    torch.manual_seed(2)
    x = torch.randn(1, 150, 4, 5)
    check_entropy(emulated, x, labels_of(150, 1, 21, 33))
    total, norm, grad, losses = entropy(emulated, x, torch.full((1, 21, 33), 255))
    assert total == norm == 0 and (grad == 0).all() and (losses == 0).all()


def test_cross_entropy_of_a_masked_class_and_large_logits(emulated):
    """-inf is the logit of a class that cannot be; 300 leaves no exponential without the maximum."""
    torch.manual_seed(3)
    x, labels = 300 * torch.randn(1, 5, 3, 4), torch.randint(0, 4, (1, 17, 30))
    check_entropy(emulated, x, labels)
    x[:, 4] = -torch.inf
    total, _, grad, losses = entropy(emulated, x, labels)
    assert losses.isfinite().all() and grad.isfinite().all() and (grad[:, 4] == 0).all() and total > 0


@pytest.mark.parametrize("encode", ["source", "target"])
@pytest.mark.parametrize(
    ("low", "seg", "high"),
    [
        ((1, 1), (1, 1), (1, 1)),
        ((3, 2), (5, 4), (11, 20)),
        ((9, 21), (4, 6), (7, 25)),
        ((4, 6), (4, 6), (40, 60)),
    ],
)
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.5, clip=0.6), dict(hard_threshold=0.4)])
def test_domain_cross_entropy(emulated, low, seg, high, encode, settings):
    torch.manual_seed(sum(high))
    x, z = 3 * torch.randn(2, 10, *low), 4 * torch.randn(2, 5, *seg)
    offset, align = (0, True) if encode == "source" else (5, False)
    temperature, clip = settings.get("temperature", 1.8), settings.get("clip", 0.9)
    threshold = settings.get("hard_threshold")
    shape = UpsampleShape(*x.shape, *high, align)
    level = clip if threshold is None else threshold
    options = DomainOptions(5, offset, *seg, 1 / temperature, level, threshold is not None)
    total, grad = torch.full((), torch.nan), torch.zeros_like(x)
    written = (grad, total, partials(emulated, shape))
    assert emulated.fastuda_domain_cross_entropy(at(x), at(z), *map(at, written), shape, options, None) == 0

    def run(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        rest = (offset, high, temperature, clip, threshold, align)
        loss = plain_domain(leaf, z.to(dtype), *rest) * (2 * high[0] * high[1])
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    for name, *three in zip(
        ("sum", "gradient"), (total, grad), run(torch.float32), run(torch.float64), strict=True
    ):
        within_budget(*three, name, torch.float32)
