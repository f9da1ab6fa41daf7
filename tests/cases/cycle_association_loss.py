import torch

import fastuda.ops as F
from bench import published
from bench.case import BOTH, Bench, Case, two_images
from tests.cases._inputs import classes_of, features, labels, predictions, tensor, tiles, with_mean

GRADIENTS = 2


def good():
    return dict(source=tensor(2, 5, 4), target=tensor(2, 3, 4), labels=labels(2, 5))


def edges():
    for contrast in (True, False):
        for b, n, m, c in ((0, 5, 3, 4), (1, 1, 1, 1), (2, 1, 3, 4), (2, 5, 1, 4)):
            yield dict(source=tensor(b, n, c), target=tensor(b, m, c), labels=labels(b, n), contrast=contrast)
    yield {"labels": labels(2, 5) - 2}


def hard():
    same, target = torch.zeros(2, 9).long(), torch.ones(2, 4, 5)
    yield "", (2, 9, 5), lambda x, b: F.cycle_association_loss(x, target, same, backend=b)[0]


def _loss(target, y, **settings):
    return lambda x, b: F.cycle_association_loss(x, target.to(x), y, backend=b, **settings)[0]


def samples(device):
    y = classes_of(2, 97, classes=3).to(device)
    yield "association", features(97), _loss(features(130, seed=1).to(device), y)
    target = predictions(2, 130, seed=13).to(device)
    yield "association of predictions", predictions(2, 97), _loss(target, y, similarity="kl")


def small():
    y = classes_of(1, 97, classes=3)
    yield "association", features(97, b=1), _loss(features(130, seed=1, b=1), y)
    target = features(135, seed=1, b=1, width=150)
    yield "association of wide features", features(97, b=1, width=150), _loss(target, y)
    for width in (12, 19, 70):  # the last is too wide for sums in registers
        target = predictions(1, 135, width, seed=13)
        name = f"association of {width} predictions"
        yield name, predictions(1, 97, width), _loss(target, y, similarity="kl")


def wide(width, device, sizes=(1500, 1700)):
    """More rows than fit a panel, of whole tiles."""
    y = classes_of(1, sizes[0], classes=3).to(device)
    yield with_mean(sizes[0], width), _loss(with_mean(sizes[1], width, seed=1).to(device), y)


def operators(device):
    x, p = torch.rand(2, 20, 8, device=device), torch.rand(2, 20, 4, device=device).softmax(-1)
    stat, index = torch.rand(2, 20, device=device) + 0.5, torch.randint(0, 20, (2, 20), device=device)
    residuals = (stat, stat, index, index, stat, stat, stat, stat)
    for kind, y in (("cosine", x), ("kl", p)):
        yield "cycle_association_loss_fwd", y, y, kind, True
        yield "cycle_association_loss_bwd", y, y, *residuals, kind


def compiled(dtype):
    for name, y in tiles(dtype).items():
        kind = name.split(" ")[0]
        stat, index = torch.rand(y.shape[:2]) + 0.5, torch.randint(0, 265, y.shape[:2])
        if name == kind:  # of other widths only the gradients are kernels of their own
            yield f"association forward {name}", "cycle_association_loss_fwd", y, y, kind, True
        residuals = (stat, stat, index, index, stat, stat, stat, stat)
        yield f"association backward {name}", "cycle_association_loss_bwd", y, y, *residuals, kind


BENCH = Bench(
    [
        *(Case("cycle_association_loss", mode, dtype, pixels, 2048)
          for dtype in ("bfloat16", "float32") for pixels in (4096, 8464) for mode in BOTH),
        Case("cycle_association_loss", "fwd+bwd", "float32", 8464, 19, "kl"),
        Case("cycle_association_loss", "fwd+bwd", "bfloat16", 32768, 256),
    ],
    two_images,
    lambda c, t, b: F.cycle_association_loss(**t, similarity=c.similarity, backend=b)[0],
    # tiles once and once for the temperatures; backward: tiles again and two gradients
    products=lambda c: 5.0 if c.backward else 2.0,
    others={"authors": lambda c: lambda t: published.cycle_association_loss(**t, similarity=c.similarity)[0]},
)  # fmt: skip
