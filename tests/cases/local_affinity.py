import torch

import fastuda.ops as F
from tests.cases._inputs import normal, tensor

BAD = {"neighbours": (0, 6), "distance": (0, -1)}


def good():
    return dict(p=tensor(2, 3, 4, 5))


def edges():
    yield from (dict(p=tensor(*s) / 2) for s in ((0, 3, 4, 5), (1, 1, 1, 1), (2, 1, 4, 5), (2, 3, 1, 5)))
    yield from ({"distance": d, "neighbours": 4} for d in (5, 10**12))


def _maps(**settings):
    return lambda x, b: F.local_affinity(x, backend=b, **settings)


def samples(device):
    p = (4 * normal(2, 7, 45, 70)).softmax(1)
    yield "affinity", p, _maps()
    yield "far affinity", p, _maps(neighbours=4, distance=20)
    yield "product", p, _maps(kind="product")


def small():
    p = (4 * normal(1, 5, 9, 30)).softmax(1)
    yield "affinity", p, _maps()
    yield "far affinity", p, _maps(neighbours=4, distance=3)
    yield "product", p, _maps(kind="product")


def operators(device):
    p, maps = torch.rand(2, 4, 3, 5, device=device).softmax(1), torch.rand(2, 32, 3, 5, device=device)
    yield "local_affinity_fwd", p, 8, 1, False
    yield "local_affinity_bwd", maps, p, 8, 1, False


def compiled(dtype):
    p = torch.rand(1, 19, 32, 32).to(dtype)
    for name, planes, rest in (("", 8 * 19, (8, 1, False)), (" far product", 4, (4, 3, True))):
        yield f"local affinity forward{name}", "local_affinity_fwd", p, *rest
        yield f"local affinity backward{name}", "local_affinity_bwd", torch.rand(1, planes, 32, 32), p, *rest
