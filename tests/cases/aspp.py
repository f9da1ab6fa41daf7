import math

import torch

import fastuda.ops as F
from bench.case import BOTH, Bench, Case, square_map
from tests.cases._inputs import normal, tensor

_DILATIONS = (6, 12, 18, 24)


def good():
    weights = [tensor(3, 4, 3, 3) - 0.5] * 2
    return dict(features=tensor(2, 4, 5, 6), weights=weights, dilations=(1, 2))


def faults():
    tap = good()["weights"][0]
    yield {"weights": tap}, TypeError, "weights", "Tensor"
    yield {"weights": [tap, tap[:2]]}, ValueError, "weights[1]", "(2, 4, 3, 3)"
    yield {"weights": [tap]}, ValueError, "dilations", "2 branches, weights of 1"
    yield {"dilations": (1, 0)}, ValueError, "dilations[1]", "got 0"
    yield {"dilations": (1, 2.5)}, TypeError, "dilations[1]", "2.5"
    for value, kind, given in (([], ValueError, "no branch"), (None, TypeError, "NoneType")):
        yield {"weights": value}, kind, "weights", given
    yield {"dilations": 6}, TypeError, "dilations", "int"
    yield {"dilations": (1,)}, ValueError, "dilations", "1 branches, weights of 2"
    for shape in ((3, 5, 3, 3), (3, 4, 1, 1), (0, 4, 3, 3)):
        yield {"weights": [tensor(*shape)] * 2}, ValueError, "weights[0]", str(shape)
    yield {"weights": [tap, tap.double()]}, TypeError, "weights[1]", "float64"
    yield {"weights": [tap.to("meta")] * 2}, ValueError, "weights[0]", "meta"
    yield {"weights": [tap.long()] * 2}, TypeError, "weights[0]", "int64"
    yield {"biases": [tensor(3)]}, ValueError, "biases", "1 branches"
    yield {"biases": [tensor(2)] * 2}, ValueError, "biases[0]", "(2,)"
    yield {"biases": [tensor(3), tensor(2)]}, ValueError, "biases[1]", "(2,)"


def _head(weights, dilations):
    return lambda x, b: F.aspp(x, [w.to(x) for w in weights], dilations=dilations, backend=b)


def hard():
    head = _head([torch.ones(2, 3, 3, 3)] * 2, (1, 2))
    yield "", (1, 3, 4, 4), lambda x, b: head(x, b)[0, 0, 0, 0]


def samples(device):
    weights = [normal(19, 40, 3, 3, seed=13 + r).to(device) / 20 for r in range(4)]
    yield "head", normal(2, 40, 33, 50, seed=12), _head(weights, _DILATIONS)


def small():
    yield "head", normal(1, 6, 7, 20, seed=12), _head([normal(3, 6, 3, 3, seed=r) for r in range(2)], (1, 6))


def operators(device):
    x, grad = torch.randn(2, 8, 3, 5, device=device), torch.randn(2, 4, 3, 5, device=device)
    taps, bias = torch.rand(2, 3, 3, 4, 8, device=device), torch.rand(4, device=device)
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        yield "aspp_fwd", y, taps, bias, [1, 2]
        for wanted in ((True, True), (True, False), (False, True)):
            yield "aspp_bwd", grad, y, taps, [1, 2], *wanted


def compiled(dtype):
    x, grad = torch.randn(1, 64, 16, 16).to(dtype), torch.randn(1, 19, 16, 16).to(dtype)
    taps, bias = torch.rand(4, 3, 3, 19, 64), torch.zeros(19)
    yield "aspp forward", "aspp_fwd", x, taps, bias, list(_DILATIONS)
    yield "aspp backward", "aspp_bwd", grad, x, taps, list(_DILATIONS), True, True


MEMORY = {"": (2 * 256 + 2 * 19) * 64 * 128 * 4 / 2**20}
"""With a copy of the features."""


def memory():
    x = torch.randn(1, 256, 64, 128).contiguous(memory_format=torch.channels_last)
    yield "", _head([torch.randn(19, 256, 3, 3) for _ in range(4)], _DILATIONS), x


def _bench_inputs(c, n, generator):
    x = square_map(c, n, generator).relu_()
    return {"x": x, "weight": torch.randn(len(_DILATIONS), 19, c.channels, 3, 3, generator=generator) * 0.01}


def _products(c):
    """Pixels whose output is inside, of every tap; the middle ones are one. Backward: features, weights."""
    side = math.isqrt(c.pixels)
    shifts = {(i * d, j * d) for d in _DILATIONS for i in (-1, 0, 1) for j in (-1, 0, 1)}
    inside = sum(max(side - abs(i), 0) * max(side - abs(j), 0) for i, j in shifts)
    return (3 if c.backward else 1) * inside * 19 / c.pixels**2


BENCH = Bench(
    [
        *(Case("aspp", mode, "float32", 4096, 512) for mode in BOTH),
        *(Case("aspp", "fwd+bwd", dtype, 8464, 2048) for dtype in ("bfloat16", "float32")),
    ],
    _bench_inputs,
    lambda c, t, b: F.aspp(t["x"], t["weight"].unbind(), dilations=_DILATIONS, backend=b),
    lambda c: (3 if c.backward else 1) * c.element * c.batch * c.pixels * c.channels,
    _products,
    lambda c: f"{c.batch}x{c.channels}x{math.isqrt(c.pixels)}², {len(_DILATIONS)} branches, 19 classes",
)
