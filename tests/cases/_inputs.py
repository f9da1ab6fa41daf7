"""Inputs that the cases share."""

from __future__ import annotations

import torch

from fastuda.ops import ClassStatistics, PrototypeBank


def tensor(*shape, dtype=torch.float32):
    """Values of (0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype) * 0.9 + 0.05


def labels(*shape, classes=3):
    """Every fifth is ignored."""
    drawn = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1))
    return drawn.masked_fill(torch.arange(drawn.numel()).reshape(shape) % 5 == 4, 255)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def classes_of(*shape, classes=19, seed=0):
    """One in five is ignored."""
    drawn = torch.randint(0, classes, shape, generator=generator(seed))
    drawn[torch.rand(shape, generator=generator(seed + 1)) < 0.2] = 255
    return drawn


def features(n, seed=0, b=2, width=97):
    return torch.rand(b, n, width, generator=generator(seed)) + 0.1


def predictions(b, n, classes=19, seed=12):
    return (2 * normal(b, n, classes, seed=seed)).softmax(-1)


def with_mean(n, width, seed=0):
    """As behind a ReLU: the channels have a mean."""
    return normal(1, n, width, seed=seed) + torch.linspace(0, 1, width)


def tiles(dtype):
    """What similarity tiles are compiled for, at the widths that matter. The number of pixels is odd, as that
    of crops often is, and there are two images, whose vectors then begin anywhere."""
    p = torch.rand(2, 265, 80)
    inputs = {"cosine": torch.rand(2, 265, 2048).to(dtype), "kl": p[..., :19].softmax(-1).to(dtype)}
    if dtype == torch.float32:
        inputs |= {"kl wide": p.softmax(-1), "kl 64": p.softmax(-1)[..., :64].contiguous()}
    return inputs


def stray(y, value):
    """One label is another value."""
    return y.masked_fill(torch.arange(y.numel()).reshape(y.shape) == 1, value)


def stray_labels(y):
    """Faults of labels that are no class of three, in several widths."""
    for value in (3, -1, -(2**62), 300):
        yield {"labels": stray(y, value)}, ValueError, "labels", str(value)
    for dtype, value in ((torch.uint8, 3), (torch.int8, -1), (torch.int32, 70000)):
        wrong = stray(y.clamp(max=2).to(dtype), value)
        yield {"labels": wrong}, ValueError, "labels", str(value)
        yield {"labels": wrong, "ignore_index": value + 256}, ValueError, "labels", str(value)


def statistics(classes=3, width=4):
    return ClassStatistics(torch.ones(classes), tensor(classes, width), tensor(classes, width))


def bank(classes=3, length=5, width=4, count=None):
    count = torch.arange(classes) + 1 if count is None else torch.tensor(count)
    return PrototypeBank(tensor(classes, length, width), count)
