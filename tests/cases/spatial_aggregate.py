import torch

import fastuda.ops as F
from tests.cases._inputs import features, predictions, tensor, tiles, with_mean

BAD = {"alpha": (2,)}


def good():
    return dict(x=tensor(2, 5, 4))


def edges():
    for contrast in (True, False):
        for shape in ((0, 5, 4), (1, 1, 1), (2, 1, 4)):
            yield dict(x=tensor(*shape), contrast=contrast)
    yield from ({"alpha": alpha} for alpha in (0, 1))


def hard():
    yield "", (1, 9, 5), lambda x, b: F.spatial_aggregate(x, backend=b)[0, 0, 0]


def _mixed(**settings):
    return lambda x, b: F.spatial_aggregate(x, backend=b, **settings)


def samples(device):
    yield "aggregation", features(97), _mixed()
    yield "aggregation of predictions", predictions(2, 97), _mixed(similarity="kl", contrast=False)


def small():
    yield "aggregation", features(97, b=1), _mixed()
    yield "aggregation of wide features", features(135, b=1, width=150), _mixed()
    for width in (12, 19, 70):  # the last is too wide for sums in registers
        yield f"aggregation of {width} predictions", predictions(1, 97, width), _mixed(similarity="kl")


def wide(width, device, sizes=(1500, 1700)):
    """More rows than fit a panel, of whole tiles."""
    yield with_mean(sizes[0], width), _mixed()


def operators(device):
    x, p = torch.rand(2, 20, 8, device=device), torch.rand(2, 20, 4, device=device).softmax(-1)
    stat = torch.rand(2, 20, device=device) + 0.5
    for kind, y in (("cosine", x), ("kl", p)):
        yield "spatial_aggregate_fwd", y, kind, True, 0.5
        yield "spatial_aggregate_bwd", y, y, y, stat, stat, kind, 0.5


def compiled(dtype):
    for name, y in tiles(dtype).items():
        kind, stat = name.split(" ")[0], torch.rand(y.shape[:2]) + 0.5
        yield f"aggregate forward {name}", "spatial_aggregate_fwd", y, kind, name == "cosine", 0.5
        yield f"aggregate backward {name}", "spatial_aggregate_bwd", y, y, y, stat, stat, kind, 0.5
