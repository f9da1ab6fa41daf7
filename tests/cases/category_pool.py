import torch

import fastuda.ops as F
from bench.case import Bench, Case
from tests.cases._inputs import normal, tensor

GRADIENTS = 2


def good():
    return dict(features=tensor(2, 5, 4), logits=tensor(2, 5, 3))


def faults():
    yield {"logits": tensor(2, 4, 3)}, ValueError, "logits", "(2, 4, 3) must share batch and pixels"


def edges():
    for b, n, c, k in ((0, 5, 4, 3), (1, 1, 1, 1), (2, 1, 4, 3), (2, 5, 4, 1)):
        yield dict(features=tensor(b, n, c), logits=tensor(b, n, k))
    for mixed in ({"logits": torch.float64}, {"features": torch.float64}, {"logits": torch.bfloat16}):
        yield {name: good()[name].to(dtype) for name, dtype in mixed.items()}


def hard():
    ones = torch.ones(1, 9, 4)
    yield "", (1, 9, 5), lambda x, b: F.category_pool(ones, x, backend=b)[0, 0, 0]


def _pools(n, width, classes, device):
    x, z = normal(2, n, width, seed=10), 4 * normal(2, n, classes, seed=11)
    features, logits = x.to(device), z.to(device)
    yield "category features", x, lambda x, b: F.category_pool(x, logits.to(x), backend=b)
    yield "category attention", z, lambda z, b: F.category_pool(features.to(z), z, backend=b)


def samples(device):
    yield from _pools(700, 40, 19, device)


def small():
    yield from _pools(150, 70, 5, "cpu")


def operators(device):
    x, p = torch.rand(2, 20, 8, device=device), torch.rand(2, 20, 4, device=device).softmax(-1)
    pooled, lse = torch.rand(2, 4, 8, device=device), torch.rand(2, 4, device=device)
    yield "category_pool_fwd", x, p
    for wanted in ((True, True), (True, False), (False, True)):
        yield "category_pool_bwd", pooled, x, p, pooled, lse, *wanted


def compiled(dtype):
    x, z = torch.rand(1, 256, 512).to(dtype), torch.randn(1, 256, 19).to(dtype)
    pooled, lse = torch.rand(1, 19, 512), torch.zeros(1, 19)
    yield "category pool forward", "category_pool_fwd", x, z
    yield "category pool backward", "category_pool_bwd", pooled, x, z, pooled, lse, True, True


MEMORY = {"": 40000 * (2 * 150 + 16) * 4 / 2**20}
"""With the soft-max, once."""


def memory():
    leaves = torch.randn(1, 40000, 16), torch.randn(1, 40000, 150)
    yield "", lambda x, z, b: F.category_pool(x, z, backend=b), *leaves


def _attention(c, n, generator):
    x = torch.randn(c.batch, n, c.channels, generator=generator).relu_()
    return {"x": x, "seg": 4 * torch.randn(c.batch, n, 19, generator=generator)}


BENCH = Bench(
    [Case("category_pool", "fwd+bwd", "float32", 8464, 2048)],
    _attention,
    lambda c, t, b: F.category_pool(t["x"], t["seg"], backend=b),
    lambda c: (2 if c.backward else 1) * 4 * c.batch * c.pixels * c.channels,
    shape=lambda c: f"{c.batch}x{c.pixels}x{c.channels}, 19 classes",
)
