import torch

import fastuda.ops as F
from tests.cases._inputs import tensor

BAD = {"stride": (0,), "padding": (-1,), "dilation": (0,)}


def good():
    return dict(x=tensor(2, 4, 5, 6), weight=tensor(4, 1, 3, 3) - 0.5, padding=1)


def faults():
    yield {"bias": tensor(3)}, ValueError, "bias", "(3,)"


def hard():
    weight = torch.ones(3, 1, 3, 3)
    yield "", (1, 3, 4, 4), lambda x, b: F.depthwise_conv2d(x, weight, padding=1, backend=b)[0, 0, 0, 0]


def operators(device):
    x, weight = torch.randn(2, 4, 5, 6, device=device), torch.randn(4, 1, 3, 3, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    yield "depthwise_conv2d_fwd", x, weight, weight[:, 0, 0, 0].contiguous(), 1, 1, 1
    yield "depthwise_conv2d_bwd", x, x, weight, 1, 1, 1, True, True


MEMORY = {"": 3 * 256 * 64 * 128 * 4 / 2**20}


def memory():
    x = torch.randn(1, 256, 64, 128).contiguous(memory_format=torch.channels_last)
    run = lambda x, w, b: F.depthwise_conv2d(x, w, padding=4, dilation=4, backend=b)  # noqa: E731
    yield "", run, x, torch.randn(256, 1, 3, 3)
