import torch

import fastuda.ops as F
from tests.cases._inputs import features, predictions, tensor, tiles, with_mean

GRADIENTS = 0


def good():
    return dict(source=tensor(2, 5, 4), target=tensor(2, 3, 4))


def faults():
    yield {"target": tensor(2, 3, 5)}, ValueError, "target", "(2, 3, 5)"
    yield {"target": tensor(2, 5, 4).double()}, ValueError, "target", "float64"


def edges():
    yield dict(source=tensor(0, 5, 4), target=tensor(0, 3, 4))
    yield dict(source=tensor(2, 1, 1), target=tensor(2, 1, 1))


def _similarities(target, **settings):
    return lambda x, b: torch.cat(F.cycle_match(x, target.to(x), backend=b, **settings)[2:], 1)


def samples(device):
    yield "match", features(97), _similarities(features(130, seed=1).to(device))
    target = predictions(2, 130, seed=13).to(device)
    yield "match of predictions", predictions(2, 97), _similarities(target, similarity="kl")


def small():
    target = features(135, seed=1, b=1, width=150)
    yield "match", features(97, b=1, width=150), _similarities(target)
    target = predictions(1, 135, 12, seed=13)
    yield "match of predictions", predictions(1, 97, 12), _similarities(target, similarity="kl")


def wide(width, device, sizes=(1500, 1700)):
    """More rows than fit a panel, of whole tiles."""
    yield with_mean(sizes[0], width), _similarities(with_mean(sizes[1], width, seed=1).to(device))


def operators(device):
    x, p = torch.rand(2, 20, 8, device=device), torch.rand(2, 20, 4, device=device).softmax(-1)
    yield "cycle_match_fwd", x, x, "cosine"
    yield "cycle_match_fwd", p, p, "kl"


def compiled(dtype):
    for kind in ("cosine", "kl"):
        yield f"match {kind}", "cycle_match_fwd", *[tiles(dtype)[kind]] * 2, kind
