import torch

import fastuda.ops as F
from bench import published
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


def _moments(y, classes):
    def run(x, b):
        found = F.class_statistics(x, y, classes, backend=b)
        return torch.cat([found.count[:, None] / len(y), found.mean, found.variance], 1)

    return run


def samples(device):
    for n, width, classes in ((300, 40, 19), (1, 1, 1), (2000, 97, 19), (700, 130, 150)):
        y = classes_of(n, classes=classes).to(device)
        yield f"statistics of {n} x {width}", normal(n, width) + 3, _moments(y, classes)


def small():
    yield "statistics", normal(150, 70) + 3, _moments(classes_of(150, classes=5), 5)


def operators(device):
    x, y = torch.rand(20, 8, device=device), torch.randint(0, 4, (20,), device=device)
    yield "class_statistics_fwd", x, y, 4, 255


def compiled(dtype):
    x, y = torch.rand(256, 512).to(dtype), torch.zeros(256, dtype=torch.long)
    yield "class statistics", "class_statistics_fwd", x, y, 19, 255


BENCH = Bench(
    [Case("class_statistics", "fwd", "float32", 12800, 512)],
    unit_features,
    lambda c, t, b: F.class_statistics(t["x"], t["labels"], 19, backend=b).variance,
    lambda c: 4 * c.pixels * c.channels,
    shape=lambda c: f"{c.pixels}x{c.channels}, 19 classes",
    others={"authors": lambda c: lambda t: published.class_statistics(t["x"], t["labels"], 19).variance},
)
