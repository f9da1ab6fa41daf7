import torch

import fastuda.ops as F
from bench.case import BOTH, Bench, Case, upsampled, upsampled_bytes, upsampled_shape
from tests.cases._inputs import classes_of, generator, labels, normal, stray_labels, tensor

BAD = {"temperature": (0,), "label_smoothing": (2,)}


def good():
    return dict(logits=tensor(2, 3, 4, 5), labels=labels(2, 7, 9))


def faults():
    yield from stray_labels(labels(2, 7, 9))
    for name, x in (("class_weight", tensor(3)), ("pixel_weight", tensor(2, 7, 9))):
        for value, kind, given in (
            (x.tolist(), TypeError, "list"),
            (2.0, TypeError, "float"),
            (x.to_sparse(), TypeError, "sparse"),
            (x.to(torch.complex64), TypeError, "complex64"),
            (x[:-1], ValueError, str(tuple(x[:-1].shape))),
            (x.to("meta"), ValueError, "meta"),
        ):
            yield {name: value}, kind, name, given
    for shape in ((2, 7, 9), (2, 4, 7, 9), (2, 3, 0, 9)):
        yield {"labels": tensor(*shape)}, ValueError, "labels", str(shape)
    yield {"labels": tensor(2, 3, 7, 9).to("meta")}, ValueError, "labels", "meta"
    yield {"labels": tensor(2, 3, 7, 9).to(torch.float8_e5m2)}, TypeError, "labels", "float8_e5m2"


def edges():
    for reduction in ("mean", "sum", "none"):
        none, same = dict(logits=tensor(0, 3, 4, 5), reduction=reduction), torch.zeros(2, 7, 9).long()
        yield dict(labels=labels(0, 7, 9), **none)
        yield dict(labels=tensor(0, 3, 7, 9), **none)
        yield dict(logits=tensor(2, 1, 4, 5), labels=same, reduction=reduction)
        yield dict(logits=tensor(2, 3, 1, 1), labels=labels(2, 1, 1), reduction=reduction)
        yield dict(labels=same + 255, reduction=reduction)
        yield dict(class_weight=torch.zeros(3), reduction=reduction)
        yield dict(class_weight=torch.tensor([1, 0, 2]), pixel_weight=labels(2, 7, 9) == 1)
    yield {"label_smoothing": 1}


def hard():
    y = torch.arange(64).reshape(1, 8, 8) % 3
    yield "", (1, 3, 4, 4), lambda x, b: F.upsample_cross_entropy(x, y, backend=b)


def _loss(y, **settings):
    return lambda x, b: F.upsample_cross_entropy(x, y, backend=b, **settings)


def samples(device):
    x, y = 3 * normal(2, 19, 11, 17), classes_of(2, 61, 93).to(device)
    yield "entropy", x, _loss(y)
    soft, weight = normal(2, 19, 61, 93, seed=2).softmax(1).to(device), torch.linspace(0.5, 2, 19).to(device)
    yield "soft entropy", x, _loss(soft, class_weight=weight, temperature=1.8, label_smoothing=0.1)
    pixels = torch.rand(2, 61, 93, generator=generator(3)).to(device)
    yield "weighted entropy", x, _loss(y, pixel_weight=pixels, reduction="none", align_corners=True)


def small():
    """Five source rows are two blocks, and so are 20 columns."""
    x, y = 3 * normal(1, 5, 6, 20), classes_of(1, 15, 46, classes=5)
    yield "entropy", x, _loss(y)
    yield "soft entropy", x, _loss(normal(1, 5, 15, 46, seed=2).softmax(1))
    yield "weighted entropy", x, _loss(y, pixel_weight=torch.rand(1, 15, 46, generator=generator(3)))
    yield "entropy of many classes", 3 * normal(1, 19, 4, 5), _loss(classes_of(1, 15, 22))


def operators(device):
    x, y = torch.randn(2, 4, 3, 5, device=device), torch.randint(0, 4, (2, 6, 9), device=device)
    for rest in ((False, 1.0, 255, 0.0, True, False), (False, 1.0, 255, 0.1, False, True)):
        yield "upsample_cross_entropy_fwd", x, y, None, None, *rest


def compiled(dtype):
    x, hard = torch.randn(1, 19, 16, 16).to(dtype), torch.zeros(1, 128, 128, dtype=torch.long)
    soft, pixels = torch.rand(1, 19, 128, 128), torch.rand(1, 128, 128)
    for name, logits, target, weight, gradient in (
        ("hard", x, hard, None, True),
        ("hard weighted", x, hard, pixels, True),
        ("soft", x, soft, None, True),
        ("value", x, hard, None, False),
        ("19 classes", torch.zeros_like(x), hard, None, True),
        ("100 classes", torch.zeros(1, 100, 16, 16).to(dtype), hard, None, True),
    ):
        rest = (False, 1.0, 255, 0.0, gradient, not gradient)
        call = (logits, target, None, weight, *rest)
        yield f"upsample cross-entropy {name}", "upsample_cross_entropy_fwd", *call


BENCH = Bench(
    [Case("upsample_cross_entropy", mode, "float32", 730, 19, batch=2) for mode in BOTH],
    upsampled,
    lambda c, t, b: F.upsample_cross_entropy(t["x"], t["labels"], backend=b),
    upsampled_bytes,
    shape=upsampled_shape,
)
