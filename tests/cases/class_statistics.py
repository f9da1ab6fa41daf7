import torch

import fastuda.ops as F
from bench.case import Bench, Case, unit_features
from tests.cases._inputs import classes_of, labels, normal, tensor

GRADIENTS = 0
BAD = {"num_classes": (0, -3)}


def good():
    return dict(features=tensor(11, 4), labels=labels(11), num_classes=3)


def edges():
    yield dict(features=tensor(0, 4), labels=labels(0))
    yield dict(features=tensor(1, 1), labels=labels(1), num_classes=1)
    yield dict(labels=labels(11) - 2)


def _variance(y, classes):
    return lambda x, b: F.class_statistics(x, y, classes, backend=b).variance


def samples(device):
    yield "statistics", normal(300, 40) + 3, _variance(classes_of(300).to(device), 19)


def small():
    yield "statistics", normal(150, 70) + 3, _variance(classes_of(150, classes=5), 5)


def operators(device):
    x, y = torch.rand(20, 8, device=device), torch.randint(0, 4, (20,), device=device)
    yield "class_statistics_fwd", x, y, 4, 255


def compiled(dtype):
    x, y = torch.rand(256, 512).to(dtype), torch.zeros(256, dtype=torch.long)
    yield "class statistics", "class_statistics_fwd", x, y, 19, 255


def _authors(c):
    from bench import published

    return lambda t: published.class_statistics(t["x"], t["labels"], 19).variance


BENCH = Bench(
    [Case("class_statistics", "fwd", "float32", 12800, 512)],
    unit_features,
    lambda c, t, b: F.class_statistics(t["x"], t["labels"], 19, backend=b).variance,
    lambda c: 4 * c.pixels * c.channels,
    shape=lambda c: f"{c.pixels}x{c.channels}, 19 classes",
    others={"authors": _authors},
)
