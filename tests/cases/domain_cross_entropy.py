import torch

import fastuda.ops as F
from bench import published
from bench.case import BOTH, Bench, Case, low
from tests.cases._inputs import normal, tensor

BAD = {"temperature": (0,), "clip": (0, 1.5), "hard_threshold": (1.1,)}


def good():
    return dict(domain_logits=tensor(2, 6, 4, 5), seg_logits=tensor(2, 3, 4, 5), encode="source")


def faults():
    for shape, given in (((2, 2, 4, 5), "[2, 4, h, w]"), ((2, 3, 4, 4), "differ in resolution: give size")):
        yield {"seg_logits": tensor(*shape)}, ValueError, f"seg_logits {shape}", given
    for size in (16, "ab", (4, 2.5), [4, None]):
        yield {"size": size}, TypeError, "size", "" if len(str(size)) > 4 else str(size)
    for size in ((16,), (1, 2, 3), (0, 4), (4, -1)):
        yield {"size": size}, ValueError, "size", "" if len(size) == 2 else str(size)


def edges():
    for encode in ("source", "target"):
        for hard in (None, 0, 1):
            for b, k, h, w in ((0, 3, 4, 5), (2, 1, 4, 5), (1, 1, 1, 1)):
                call = dict(domain_logits=tensor(b, 2 * k, h, w), seg_logits=tensor(b, k, h, w))
                yield dict(encode=encode, hard_threshold=hard, **call)
                yield dict(encode=encode, hard_threshold=hard, size=[7, 9], **call)
    yield {"clip": 1}
    yield {"seg_logits": tensor(2, 3, 4, 5, dtype=torch.float64)}


def _loss(seg, size, encode="target", **settings):
    return lambda x, b: F.domain_cross_entropy(x, seg.to(x), encode=encode, size=size, backend=b, **settings)


def hard():
    yield "", (1, 6, 4, 4), _loss(torch.ones(1, 3, 4, 4), (8, 8))


_HARD = dict(hard_threshold=0.4, align_corners=False)


def samples(device):
    x, seg = 3 * normal(2, 38, 11, 17), 4 * normal(2, 19, 9, 14, seed=4).to(device)
    yield "domain", x, _loss(seg, (61, 93))
    yield "hard domain", x, _loss(seg, (61, 93), **_HARD)


def small():
    """Five source rows are two blocks, and so are 20 columns."""
    x, seg = 3 * normal(1, 10, 6, 20), 4 * normal(1, 5, 4, 7, seed=4)
    yield "domain", x, _loss(seg, (15, 46), temperature=0.5, clip=0.6)
    yield "hard domain", x, _loss(seg, (15, 46), **_HARD)
    yield "domain of the source", x, _loss(seg, (15, 46), "source")
    yield "domain of many classes", 3 * normal(1, 38, 4, 5), _loss(4 * normal(1, 19, 3, 4, seed=4), (15, 22))


def operators(device):
    pair, seg = torch.randn(2, 8, 3, 5, device=device), torch.randn(2, 4, 3, 5, device=device)
    for threshold, gradient in ((None, True), (0.5, False)):
        yield "domain_cross_entropy_fwd", pair, seg, 4, 6, 9, True, 1.8, 0.9, threshold, gradient


def compiled(dtype):
    pair, seg = torch.randn(1, 38, 16, 16).to(dtype), torch.randn(1, 19, 16, 16).to(dtype)
    for name, threshold in (("soft", None), ("hard", 0.5)):
        rest = (19, 128, 128, True, 1.8, 0.9, threshold, True)
        yield f"domain cross-entropy {name}", "domain_cross_entropy_fwd", pair, seg, *rest


MEMORY = {"": 2 * 38 * 64 * 128 * 4 / 2**20}


def memory():
    domain, seg = torch.randn(1, 38, 64, 128), torch.randn(1, 19, 64, 128)
    yield "", _loss(seg, (512, 1024)), domain


def _bench_inputs(c, n, generator):
    size = (c.batch, c.channels, low(n // 2), low(n))
    x = 4 * torch.randn(size[0], 2 * size[1], *size[2:], generator=generator)
    return {"x": x, "seg": 4 * torch.randn(size, generator=generator)}


def _eightfold(t):
    return dict(encode="target", size=(8 * t["x"].shape[2], 8 * t["x"].shape[3]))


BENCH = Bench(
    [Case("domain_cross_entropy", mode, "float32", 1024, 19) for mode in BOTH],
    _bench_inputs,
    lambda c, t, b: F.domain_cross_entropy(t["x"], t["seg"], **_eightfold(t), backend=b),
    lambda c: (5 if c.backward else 3) * 4 * c.batch * c.channels * low(c.pixels // 2) * low(c.pixels),
    shape=lambda c: f"{c.batch}x{2 * c.channels} to {c.pixels // 2}x{c.pixels}",
    others={"authors": lambda c: lambda t: published.domain_cross_entropy(t["x"], t["seg"], **_eightfold(t))},
)
