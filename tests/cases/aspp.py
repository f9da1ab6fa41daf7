import torch

import fastuda.ops as F
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
    yield {"biases": [tensor(3)]}, ValueError, "biases", "1 branches"
    yield {"biases": [tensor(2)] * 2}, ValueError, "biases[0]", "(2,)"


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
    yield "aspp_fwd", x, taps, bias, [1, 2]
    yield "aspp_bwd", grad, x, taps, [1, 2], True, True


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
