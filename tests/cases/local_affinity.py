import torch

import fastuda.ops as F
from bench.case import BOTH, Bench, Case, plane_shape, planes
from tests.cases._inputs import normal, tensor

BAD = {"neighbours": (0,), "distance": (0, -1)}


def good():
    return dict(p=tensor(2, 3, 4, 5))


def faults():
    yield {"neighbours": 6}, ValueError, "neighbours", "4 or 8, got 6"


def edges():
    yield from (dict(p=tensor(*s) / 2) for s in ((0, 3, 4, 5), (1, 1, 1, 1), (2, 1, 4, 5), (2, 3, 1, 5)))
    yield from ({"distance": d, "neighbours": 4} for d in (5, 10**12))


def _maps(**settings):
    return lambda x, b: F.local_affinity(x, backend=b, **settings)


def _kinds(p, distance):
    yield "affinity", p, _maps()
    yield "far affinity", p, _maps(neighbours=4, distance=distance)
    yield "product", p, _maps(kind="product")


def samples(device):
    yield from _kinds((4 * normal(2, 7, 45, 70)).softmax(1), 20)


def small():
    yield from _kinds((4 * normal(1, 5, 9, 30)).softmax(1), 3)


def operators(device):
    p = torch.rand(2, 4, 3, 5, device=device).softmax(1)
    for product, planes_out in ((False, 32), (True, 8)):
        yield "local_affinity_fwd", p, 8, 1, product
        yield "local_affinity_bwd", torch.rand(2, planes_out, 3, 5, device=device), p, 8, 1, product


def compiled(dtype):
    p = torch.rand(1, 19, 32, 32).to(dtype)
    for name, count, rest in (("", 8 * 19, (8, 1, False)), (" far product", 4, (4, 3, True))):
        yield f"local affinity forward{name}", "local_affinity_fwd", p, *rest
        yield f"local affinity backward{name}", "local_affinity_bwd", torch.rand(1, count, 32, 32), p, *rest


BENCH = Bench(
    [Case("local_affinity", mode, "float32", 1024, 19) for mode in BOTH],
    planes,
    lambda c, t, b: F.local_affinity(t["x"], backend=b),
    lambda c: (19 if c.backward else 9) * 4 * c.batch * c.channels * c.pixels**2 // 2,
    shape=plane_shape,
)
