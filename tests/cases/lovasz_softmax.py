import torch

import fastuda.ops as F
from bench.case import Bench, Case, upsampled, upsampled_bytes, upsampled_shape
from tests.cases._inputs import classes_of, labels, normal, stray_labels, tensor

EVERY_DTYPE = True


def good():
    return dict(x=tensor(2, 3, 4, 5).softmax(1), labels=labels(2, 4, 5))


def faults():
    yield from stray_labels(labels(2, 4, 5))
    yield {"labels": labels(2, 7, 9)}, ValueError, "labels", "(2, 7, 9)"
    foreign = labels(2, 7, 9, classes=9)
    yield {"labels": foreign, "from_logits": True}, ValueError, "labels", "3, 4, 5"


def edges():
    for logits in (False, True):
        for per_image in (False, True):
            settings = dict(from_logits=logits, per_image=per_image)
            yield dict(x=tensor(0, 3, 4, 5), labels=labels(0, 4, 5), **settings)
            yield dict(x=torch.full((2, 1, 7, 9), 0.5), labels=torch.zeros(2, 7, 9).long(), **settings)
            yield dict(labels=labels(2, 4, 5) * 0 + 255, **settings)
    yield dict(x=tensor(1, 3, 1, 1), labels=labels(1, 2, 2), from_logits=True)


def hard():
    y = (torch.arange(64).reshape(1, 8, 8) % 3).clamp(1)
    yield "", (1, 3, 4, 4), lambda x, b: F.lovasz_softmax(x, y, from_logits=True, backend=b)


def _loss(y):
    return lambda x, b: F.lovasz_softmax(x, y, from_logits=True, backend=b)


def samples(device):
    yield "lovasz", 3 * normal(2, 19, 11, 17), _loss(classes_of(2, 61, 93).to(device))


def small():
    yield "lovasz", 3 * normal(1, 5, 4, 5), _loss(classes_of(1, 15, 22, classes=5))
    yield "lovasz in parts", normal(1, 3, 6, 20), _loss(classes_of(1, 15, 46, classes=3))


def operators(device):
    y = torch.randint(0, 4, (2, 6, 9), device=device)
    for logits, size in ((True, (3, 5)), (False, (6, 9))):
        x = torch.randn(2, 4, *size, device=device).softmax(1)
        yield "lovasz_softmax_fwd", x, y, logits, False, 255, True


def compiled(dtype):
    x, y = torch.randn(1, 19, 16, 16).to(dtype), torch.zeros(1, 128, 128, dtype=torch.long)
    yield "lovasz softmax", "lovasz_softmax_fwd", x, y, True, False, 255, True


BENCH = Bench(
    [Case("lovasz_softmax", "fwd+bwd", "float32", 730, 19, batch=2)],
    upsampled,
    lambda c, t, b: F.lovasz_softmax(t["x"], t["labels"], from_logits=True, backend=b),
    upsampled_bytes,
    shape=upsampled_shape,
)
