import torch
import torch.nn.functional as nnf

import fastuda.ops as F
from bench.case import Bench, CannotExpress, Case, two_images
from tests.cases._inputs import features, predictions, tensor, tiles, with_mean

GRADIENTS = 0


def good():
    return dict(source=tensor(2, 5, 4), target=tensor(2, 3, 4))


def faults():
    yield {"target": tensor(2, 3, 5)}, ValueError, "target", "(2, 3, 5)"
    yield {"target": tensor(2, 5, 4).double()}, ValueError, "target", "float64"


def edges():
    yield dict(source=tensor(0, 5, 4), target=tensor(0, 3, 4))
    yield dict(source=tensor(2, 1, 1), target=tensor(2, 1, 1))


def _similarities(target, **settings):
    return lambda x, b: torch.cat(F.cycle_match(x, target.to(x), backend=b, **settings)[2:], 1)


def samples(device):
    yield "match", features(97), _similarities(features(130, seed=1).to(device))
    target = predictions(2, 130, seed=13).to(device)
    yield "match of predictions", predictions(2, 97), _similarities(target, similarity="kl")


def small():
    target = features(135, seed=1, b=1, width=150)
    yield "match", features(97, b=1, width=150), _similarities(target)
    target = predictions(1, 135, 12, seed=13)
    yield "match of predictions", predictions(1, 97, 12), _similarities(target, similarity="kl")


def wide(width, device, sizes=(1500, 1700)):
    """More rows than fit a panel, of whole tiles."""
    yield with_mean(sizes[0], width), _similarities(with_mean(sizes[1], width, seed=1).to(device))


def operators(device):
    x, p = torch.rand(2, 20, 8, device=device), torch.rand(2, 20, 4, device=device).softmax(-1)
    yield "cycle_match_fwd", x, x, "cosine"
    yield "cycle_match_fwd", p, p, "kl"


def compiled(dtype):
    for kind in ("cosine", "kl"):
        yield f"match {kind}", "cycle_match_fwd", *[tiles(dtype)[kind]] * 2, kind


def _faiss(case):
    """Both hops with an exact inner-product index (FAISS)."""
    if case.dtype != "float32" or case.similarity != "cosine":
        raise CannotExpress
    try:
        import faiss
    except ImportError as error:
        raise CannotExpress("faiss is not installed") from error

    def hop(query, key):
        index = faiss.IndexFlatIP(key.shape[-1])
        index.add(key.numpy())
        return torch.from_numpy(index.search(query.numpy(), 1)[0][:, 0])

    def run(t):
        source, target = (nnf.normalize(t[name], dim=-1)[0] for name in ("source", "target"))
        return torch.cat([hop(source, target), hop(target, source)])[None]

    return run


def _keops(case):
    """Both hops with a symbolic matrix (KeOps)."""
    if case.dtype != "float32" or case.similarity != "cosine":
        raise CannotExpress
    try:
        from pykeops.torch import LazyTensor
    except ImportError as error:
        raise CannotExpress("pykeops is not installed") from error

    def run(t):
        a, b = (nnf.normalize(t[name], dim=-1) for name in ("source", "target"))
        product = (LazyTensor(a[:, :, None]) * LazyTensor(b[:, None])).sum(-1)
        return torch.cat([product.max(dim=2)[..., 0], product.max(dim=1)[..., 0]], 1)

    return run


BENCH = Bench(
    [Case("cycle_match", "fwd", dtype, 4096, 2048) for dtype in ("bfloat16", "float32")],
    two_images,
    lambda c, t, b: torch.cat(
        F.cycle_match(t["source"], t["target"], similarity=c.similarity, backend=b)[2:], 1
    ),
    products=lambda c: 1.0 if c.similarity == "cosine" else 2.0,
    others={"keops": _keops, "faiss": _faiss},
)
