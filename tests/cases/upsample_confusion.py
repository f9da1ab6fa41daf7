import torch

import fastuda.ops as F
from bench.case import Bench, Case, label_blocks, low
from tests.cases._inputs import classes_of, labels, normal, stray_labels, tensor

GRADIENTS = 0


def good():
    return dict(x=tensor(2, 3, 4, 5), labels=labels(2, 7, 9))


def faults():
    yield from stray_labels(labels(2, 7, 9))
    yield {"x": tensor(2, 256, 1, 1)}, ValueError, "x", "(2, 256, 1, 1)"


def edges():
    yield dict(x=tensor(0, 3, 4, 5), labels=labels(0, 7, 9))
    yield dict(x=tensor(2, 1, 4, 5), labels=torch.zeros(2, 7, 9).long())


def _truth(y):
    """The counts of the truth, which no rounding changes."""
    return lambda x, b: F.upsample_confusion(x, y, backend=b).sum(1).float()


def samples(device):
    for classes in (19, 150):
        y = classes_of(2, 61, 93, classes=classes).to(device)
        yield f"confusion of {classes}", normal(2, classes, 11, 17), _truth(y)


def small():
    for classes in (5, 40):  # a histogram, and single counts
        y = classes_of(2, 15, 46, classes=classes)
        yield f"confusion of {classes}", normal(2, classes, 6, 20), _truth(y)


def operators(device):
    x, y = torch.randn(2, 4, 3, 5, device=device), torch.randint(0, 4, (2, 6, 9), device=device)
    yield "upsample_confusion_fwd", x, y, False, 255


def compiled(dtype):
    y = torch.zeros(1, 128, 128, dtype=torch.long)
    for classes in (19, 100):
        x = torch.zeros(1, classes, 16, 16).to(dtype)
        yield f"upsample confusion {classes}", "upsample_confusion_fwd", x, y, False, 255


def _frame(c, n, generator):
    logits = 2 * torch.randn(c.batch, c.channels, low(n // 2), low(n), generator=generator)
    return {"x": logits, "labels": label_blocks(generator, c.batch, n // 2, n, classes=c.channels)}


BENCH = Bench(
    [Case("upsample_confusion", "fwd", "float32", 2048, 19)],
    _frame,
    lambda c, t, b: F.upsample_confusion(t["x"], t["labels"], backend=b).to(t["x"].dtype),
    lambda c: 8 * c.batch * c.pixels**2 // 2,
    shape=lambda c: f"{c.batch}x{c.channels} to {c.pixels // 2}x{c.pixels}",
)
