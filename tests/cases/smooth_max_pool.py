import torch

import fastuda.ops as F
from bench.case import Bench, Case, plane_shape, planes
from tests.cases._inputs import normal, tensor

BAD = {"k": (0,)}


def good():
    return dict(logits=tensor(2, 3, 4, 5))


def edges():
    yield from (dict(logits=tensor(*shape)) for shape in ((0, 3, 4, 5), (1, 1, 1, 1)))


def hard():
    yield "", (1, 3, 4, 4), lambda x, b: F.smooth_max_pool(x, backend=b)[0, 0]


def _sharp(x, b):
    return F.smooth_max_pool(x, k=3.0, backend=b)


def samples(device):
    yield "pooling", 3 * normal(2, 19, 11, 17), _sharp


def small():
    yield from samples("cpu")
    yield "pooling in parts", 6 * normal(2, 3, 13, 17), lambda x, b: F.smooth_max_pool(x, k=0.3, backend=b)


def operators(device):
    z, plane = torch.randn(2, 4, 3, 5, device=device), torch.rand(2, 4, device=device)
    yield "smooth_max_pool_fwd", z, 1.0
    yield "smooth_max_pool_bwd", plane, z, plane, 1.0


def compiled(dtype):
    z, plane = torch.randn(1, 19, 16, 16).to(dtype), torch.zeros(1, 19)
    yield "smooth max forward", "smooth_max_pool_fwd", z, 1.0
    yield "smooth max backward", "smooth_max_pool_bwd", plane, z, plane, 1.0


MEMORY = {"": 8 * 512 * 1024 * 4 / 2**20}


def memory():
    yield "", lambda x, b: F.smooth_max_pool(x, backend=b), torch.randn(1, 8, 512, 1024)


BENCH = Bench(
    [Case("smooth_max_pool", "fwd+bwd", "float32", 1024, 19)],
    planes,
    lambda c, t, b: F.smooth_max_pool(t["x"], backend=b),
    lambda c: (3 if c.backward else 1) * 4 * c.batch * c.channels * c.pixels**2 // 2,
    shape=plane_shape,
)
