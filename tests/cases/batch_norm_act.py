import math

import torch

import fastuda.ops as F
from bench.case import BOTH, Bench, Case, square_map
from tests.cases._inputs import normal, tensor

GRADIENTS = 3
BAD = {"momentum": (1.1,), "eps": (0,), "activation": ("gelu",)}


def good():
    channels = [tensor(4) + i for i in range(4)]
    names = ("weight", "bias", "running_mean", "running_var")
    return dict(x=4 * tensor(2, 4, 5, 6), **dict(zip(names, channels, strict=True)), training=False)


def faults():
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield {name: tensor(3)}, ValueError, name, "shape (4,), got (3,)"
        yield {name: tensor(4).bfloat16()}, TypeError, name, "float32 beside torch.float32 x"
        yield {name: tensor(4).double()}, TypeError, name, "torch.float64"
    single = dict(x=tensor(1, 4, 1, 1), training=True)
    yield single, ValueError, "training", "more than 1 value per channel, got x of shape (1, 4, 1, 1)"


def edges():
    yield from (dict(activation=name) for name in ("relu", "relu6"))
    yield dict(x=tensor(0, 4, 5, 6))
    yield dict(x=tensor(1, 4, 1, 1))
    yield from (dict(training=True, momentum=m) for m in (0.0, 1.0))
    yield dict(x=torch.ones(2, 4, 3, 3), training=True)


def _run(x, backend, parameters=None, **settings):
    """In training, beside statistics that are thrown away."""
    c, kind = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    if parameters is None:
        parameters = torch.stack([torch.linspace(0.5, 2, c), torch.linspace(-1, 3, c)]).to(x.device)
    mean, var = torch.zeros(c, dtype=kind, device=x.device), torch.ones(c, dtype=kind, device=x.device)
    weight, bias = parameters.to(kind)
    return F.batch_norm_act(x, weight, bias, mean, var, training=True, backend=backend, **settings)


def hard():
    yield "", (1, 3, 4, 4), lambda x, b: _run(x, b, activation="relu6")[0, 0, 0, 0]


def _by(x, parameters, activation):
    """By features, and by weight and bias."""
    name = f"batch norm {activation}"
    yield name, x, lambda y, b: _run(y, b, activation=activation)
    yield f"{name} parameters", parameters, lambda p, b: _run(x.to(p), b, p, activation=activation)


def samples(device):
    for activation in ("none", "relu6"):
        x = normal(2, 40, 33, 50, seed=12).to(device) + 0.5
        yield from _by(x, normal(2, 40, seed=17).to(device), activation)


def small():
    """More channels than a tile takes, and several runs of pixels."""
    yield from _by(normal(2, 150, 23, 17, seed=12) + 0.5, normal(2, 150, seed=17), "relu6")


def operators(device):
    x, grad = torch.randn(2, 4, 6, 7, device=device), torch.randn(2, 4, 6, 7, device=device)
    mean, weight, bias = torch.randn(3, 4, device=device)
    variance = torch.rand(4, device=device) + 0.5
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        yield "batch_norm_act_moments", y
        for low, high in ((-math.inf, math.inf), (0.0, 6.0)):
            given = (y, mean, variance, weight, bias, 1e-5, low, high)
            yield "batch_norm_act_fwd", *given
            for training, for_x in ((True, True), (False, True), (True, False)):
                yield "batch_norm_act_bwd", grad, *given, training, for_x


def compiled(dtype):
    x = torch.randn(1, 64, 16, 16).to(dtype)
    given = (x, torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64), 1e-5, 0.0, 6.0)
    yield "batch norm moments", "batch_norm_act_moments", x
    yield "batch norm forward", "batch_norm_act_fwd", *given
    yield "batch norm backward", "batch_norm_act_bwd", x, *given, True, True


MEMORY = {"": 3 * 256 * 64 * 128 * 4 / 2**20}


def memory():
    x = torch.randn(1, 256, 64, 128).contiguous(memory_format=torch.channels_last)
    yield "", lambda x, p, b: _run(x, b, p, activation="relu6"), x, torch.rand(2, 256)


def _bench_inputs(c, n, generator):
    parameters = torch.rand(2, c.channels, generator=generator)
    return {"x": square_map(c, n, generator), "weight": parameters}


BENCH = Bench(
    [Case("batch_norm_act", mode, dtype, 1024, 960) for dtype in ("bfloat16", "float32") for mode in BOTH],
    _bench_inputs,
    lambda c, t, b: _run(t["x"], b, t["weight"], activation="relu6"),
    lambda c: (8 if c.backward else 3) * c.element * c.batch * c.pixels * c.channels,
    shape=lambda c: f"{c.batch}x{c.channels}x{math.isqrt(c.pixels)}², ReLU6",
)
