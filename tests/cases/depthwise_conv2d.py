import math

import torch

import fastuda.ops as F
from bench.case import BOTH, Bench, Case, square_map
from tests.cases._inputs import normal, tensor

GRADIENTS = 2
BAD = {"stride": (0,), "padding": (-1,), "dilation": (0,)}


def good():
    return dict(x=tensor(2, 4, 5, 6), weight=tensor(4, 1, 3, 3) - 0.5, padding=1)


def faults():
    for shape in ((4, 4, 3, 3), (3, 1, 3, 3)):
        yield {"weight": tensor(*shape)}, ValueError, "weight", str(shape)
    yield {"bias": tensor(3)}, ValueError, "bias", "shape (4,), got (3,)"
    yield {"bias": tensor(4).long()}, TypeError, "bias", "int64"
    yield {"stride": (2, 2)}, TypeError, "stride", "(2, 2)"
    yield {"dilation": 4}, ValueError, "dilation", "(3, 3) with dilation 4 is larger than x"


def hard():
    weight = torch.ones(3, 1, 3, 3)
    yield "", (1, 3, 4, 4), lambda x, b: F.depthwise_conv2d(x, weight, padding=1, backend=b)[0, 0, 0, 0]


def _both(x, weight, **settings):
    """By features, and by weights."""
    yield "depthwise", x, lambda y, b: F.depthwise_conv2d(y, weight.to(y), backend=b, **settings)
    yield "depthwise weights", weight, lambda w, b: F.depthwise_conv2d(x.to(w), w, backend=b, **settings)


def samples(device):
    x, weight = normal(2, 40, 33, 50, seed=12).to(device), normal(40, 1, 3, 3, seed=17).to(device)
    yield from _both(x, weight, padding=4, dilation=4)


def small():
    """More channels than a tile takes."""
    x, weight = normal(2, 150, 9, 11, seed=12), normal(150, 1, 3, 3, seed=17)
    yield from _both(x, weight, stride=2, padding=4, dilation=2)


def operators(device):
    x, weight = torch.randn(2, 4, 6, 7, device=device), torch.randn(4, 1, 3, 3, device=device)
    grad = torch.randn(2, 4, 4, 5, device=device)
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        for bias in (None, torch.randn(4, device=device)):
            yield "depthwise_conv2d_fwd", y, weight, bias, 2, 3, 2
        for wanted in ((True, True), (True, False), (False, True)):
            yield "depthwise_conv2d_bwd", grad, y, weight, 2, 3, 2, *wanted


def compiled(dtype):
    x, weight = torch.randn(1, 64, 16, 16).to(dtype), torch.rand(64, 1, 3, 3)
    for stride in (1, 2):
        grad, rest = x[..., ::stride, ::stride], (stride, 2, 2)
        yield f"depthwise forward {stride}", "depthwise_conv2d_fwd", x, weight, None, *rest
        yield f"depthwise backward {stride}", "depthwise_conv2d_bwd", grad, x, weight, *rest, True, True


MEMORY = {"": 3 * 256 * 64 * 128 * 4 / 2**20}


def memory():
    x = torch.randn(1, 256, 64, 128).contiguous(memory_format=torch.channels_last)
    run = lambda x, w, b: F.depthwise_conv2d(x, w, padding=4, dilation=4, backend=b)  # noqa: E731
    yield "", run, x, torch.randn(256, 1, 3, 3)


def _bench_inputs(c, n, generator):
    return {"x": square_map(c, n, generator), "weight": torch.randn(c.channels, 1, 3, 3, generator=generator)}


def _dilation(c):
    return 18 if c.channels == 1024 else 4


BENCH = Bench(
    # the last blocks of MobileNetV2 at stride 8, and the widest branch of the DAFormer head
    [Case("depthwise_conv2d", mode, "float32", 1024, 960) for mode in BOTH]
    + [Case("depthwise_conv2d", mode, "float32", 4096, 1024) for mode in BOTH],
    _bench_inputs,
    lambda c, t, b: F.depthwise_conv2d(
        t["x"], t["weight"], padding=_dilation(c), dilation=_dilation(c), backend=b
    ),
    lambda c: (5 if c.backward else 2) * c.element * c.batch * c.pixels * c.channels,
    shape=lambda c: f"{c.batch}x{c.channels}x{math.isqrt(c.pixels)}², 3x3 dilated by {_dilation(c)}",
)
