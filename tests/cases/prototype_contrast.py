import dataclasses

import torch

import fastuda.ops as F
from bench import published
from bench.case import Bench, Case, unit_features
from fastuda.ops import ClassStatistics, PrototypeBank
from tests.cases._inputs import bank, classes_of, labels, normal, statistics, stray_labels, tensor

BAD = {"tau": (0,)}


def good():
    return dict(features=tensor(11, 4), labels=labels(11), prototypes=statistics())


def faults():
    yield from stray_labels(labels(11))
    for kind in ("dist", "proto", "bank"):
        for value, given in ((tensor(3, 4), "Tensor"), (None, "None")):
            yield {"prototypes": value, "kind": kind}, TypeError, "prototypes", given
    yield {"prototypes": bank()}, ValueError, "prototypes", "does not go with a PrototypeBank"
    yield {"prototypes": statistics(), "kind": "bank"}, ValueError, "prototypes", "ClassStatistics"
    yield {"prototypes": statistics(width=5)}, ValueError, "prototypes", "width 5"
    yield {"prototypes": statistics(classes=0)}, ValueError, "prototypes", "0 classes"
    moved = ClassStatistics(*(x.to("meta") for x in vars(statistics()).values()))
    yield {"prototypes": moved}, ValueError, "prototypes", "meta"
    for field in ("mean", "variance"):
        for value, error, given in (
            (None, TypeError, "None"),
            (tensor(3, 4).long(), TypeError, "int64"),
            (tensor(4), ValueError, "(4,)"),
            (tensor(3, 0), ValueError, "(3, 0)"),
        ):
            wrong = dataclasses.replace(statistics(), **{field: value})
            yield {"prototypes": wrong}, error, f"prototypes.{field}", given
    for value, given in ((tensor(2, 4), "(2, 4)"), (tensor(3, 4).to("meta"), "meta")):
        wrong = dataclasses.replace(statistics(), variance=value)
        yield {"prototypes": wrong}, ValueError, "prototypes.variance", given
    for field, value, error, given in (
        ("vectors", None, TypeError, "None"),
        ("vectors", tensor(3, 4), ValueError, "(3, 4)"),
        ("vectors", tensor(3, 0, 4), ValueError, "(3, 0, 4)"),
        ("count", [1, 2, 3], TypeError, "list"),
        ("count", torch.ones(3), TypeError, "float32"),
        ("count", torch.ones(2).long(), ValueError, "(2,)"),
        ("count", torch.tensor([1, 6, 0]), ValueError, "[1, 6, 0]"),
        ("count", torch.tensor([1, -1, 0]), ValueError, "[1, -1, 0]"),
    ):
        wrong = dataclasses.replace(bank(), **{field: value})
        yield {"prototypes": wrong, "kind": "bank"}, error, f"prototypes.{field}", given


def edges():
    for kind in ("dist", "proto", "bank"):
        make = bank if kind == "bank" else statistics
        yield dict(features=tensor(0, 4), labels=labels(0), prototypes=make(), kind=kind)
        yield dict(features=tensor(1, 4), labels=labels(1), prototypes=make(), kind=kind)
        yield dict(labels=torch.zeros(11).long(), prototypes=make(classes=1), kind=kind)
        yield dict(features=tensor(11, 1), prototypes=make(width=1), kind=kind)
        yield dict(labels=labels(11) * 0 + 255, prototypes=make(), kind=kind)
    for count in ([0, 0, 0], [5, 5, 5], [0, 1, 5]):
        yield dict(prototypes=bank(count=count), kind="bank")


def _loss(y, prototypes, **settings):
    return lambda x, b: F.prototype_contrast(x, y, prototypes, backend=b, **settings)


def hard():
    y = torch.arange(9) % 3
    yield "", (9, 5), _loss(y, ClassStatistics(torch.ones(3), *torch.ones(2, 3, 5)))
    filled = PrototypeBank(torch.ones(3, 2, 5), torch.full((3,), 2))
    yield "bank", (9, 5), _loss(y, filled, kind="bank")


def _contrasts(n, classes, length, device, **settings):
    """Of 40 channels."""
    mean, spread = (normal(classes, 40, seed=s).to(device) for s in (6, 7))
    counts = (torch.arange(classes) * 3).clamp(max=length).to(device)
    y = classes_of(n, classes=classes, seed=9).to(device)
    given = ClassStatistics(counts, mean, spread.square())
    for kind in ("proto", "dist"):
        yield kind, normal(n, 40), _loss(y, given, kind=kind, **settings)
    vectors = normal(classes, length, 40, seed=8).to(device)
    yield "bank", normal(n, 40), _loss(y, PrototypeBank(vectors, counts), kind="bank", **settings)


def samples(device):
    yield from _contrasts(700, 19, 50, device, tau=2.0)


def small():
    yield from _contrasts(150, 5, 30, "cpu", tau=2.0)


def operators(device):
    x, y = torch.rand(20, 8, device=device), torch.randint(0, 4, (20,), device=device)
    mean, share = torch.rand(4, 8, device=device), torch.rand(20, 4, device=device)
    for spread in (None, mean):
        yield "prototype_contrast_fwd", x, y, mean, spread, 1.0, 255
        yield "prototype_contrast_bwd", torch.ones((), device=device), x, y, share, mean, spread, 1.0, 255
    vectors, count = torch.rand(4, 5, 8, device=device), torch.full((4,), 5, device=device)
    yield "prototype_contrast_bank_fwd", x, y, vectors, count, 1.0, 255, True


def compiled(dtype):
    x, y = torch.rand(256, 512).to(dtype), torch.zeros(256, dtype=torch.long)
    mean, share = torch.rand(19, 512), torch.rand(256, 19)
    for name, variance in (("proto", None), ("dist", mean)):
        rest = (mean, variance, 100.0, 255)
        yield f"prototype contrast forward {name}", "prototype_contrast_fwd", x, y, *rest
        yield f"prototype contrast backward {name}", "prototype_contrast_bwd", mean[0, 0], x, y, share, *rest
    vectors, count = torch.rand(19, 40, 512), torch.full((19,), 40)
    yield "bank contrast", "prototype_contrast_bank_fwd", x, y, vectors, count, 100.0, 255, True


MEMORY = {"dist": 40000 * (150 + 16) * 4 / 2**20, "bank": 2 * 40000 * 16 * 4 / 2**20}


def memory():
    x, y = torch.randn(40000, 16), torch.randint(0, 150, (40000,))
    yield "dist", _loss(y, ClassStatistics(torch.ones(150), *torch.rand(2, 150, 16)), kind="dist"), x
    full = PrototypeBank(torch.rand(19, 500, 16), torch.full((19,), 500))
    yield "bank", _loss(y % 19, full, kind="bank"), x


def _bench_inputs(c, n, generator):
    t = unit_features(c, n, generator)
    given = F.class_statistics(t["x"], t["labels"], 19, backend="reference")
    return {**t, "mean": given.mean, "variance": given.variance}


def _given(t):
    return t["x"], t["labels"], ClassStatistics(t["labels"].new_ones(19), t["mean"], t["variance"])


BENCH = Bench(
    [Case("prototype_contrast", "fwd+bwd", "float32", 12800, 512)],
    _bench_inputs,
    lambda c, t, b: F.prototype_contrast(*_given(t), tau=0.1, backend=b),
    lambda c: 3 * 4 * c.pixels * c.channels,
    shape=lambda c: f"{c.pixels}x{c.channels}, 19 prototypes",
    others={"authors": lambda c: lambda t: published.prototype_contrast(*_given(t), tau=0.1)},
)
