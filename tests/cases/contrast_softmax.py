import torch

import fastuda.ops as F
from bench.case import BOTH, Bench, Case
from tests.cases._inputs import normal, tensor

BAD = {"eps": (0, 1e-300)}
ANY_RANK = True


def good():
    return dict(x=tensor(2, 5, 4))


def edges():
    yield from (dict(x=tensor(*shape)) for shape in ((0, 4), (3, 0, 4), (1,), (2, 1)))
    yield dict(x=torch.ones(2, 4))


def hard():
    yield "", (9, 5), lambda x, b: F.contrast_softmax(x, backend=b)[0, 0]


def samples(device):
    yield "contrast", normal(3, 70, 63), lambda x, b: F.contrast_softmax(x, backend=b)


def small():
    yield from samples("cpu")
    yield "long rows", normal(70, 2100), lambda x, b: F.contrast_softmax(x, backend=b)


def operators(device):
    p, inverse = torch.rand(2, 20, 4, device=device).softmax(-1), torch.rand(2, 20, device=device) + 0.5
    yield "contrast_softmax_fwd", p, 1e-10
    yield "contrast_softmax_bwd", p, p, inverse


def compiled(dtype):
    for width in (8464, 40000):
        rows = torch.rand(4, width).to(dtype)
        yield f"contrast softmax forward {width}", "contrast_softmax_fwd", rows, 1e-10
        yield f"contrast softmax backward {width}", "contrast_softmax_bwd", rows, rows, torch.rand(4)


BENCH = Bench(
    [Case("contrast_softmax", mode, "float32", 8464, 8464) for mode in BOTH],
    lambda c, n, generator: {"x": torch.randn(c.batch, n, c.channels, generator=generator)},
    lambda c, t, b: F.contrast_softmax(t["x"], backend=b),
    lambda c: (5 if c.backward else 2) * c.element * c.batch * c.pixels * c.channels,
)
