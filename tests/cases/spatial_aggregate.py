import torch
import torch.nn.functional as nnf

import fastuda.ops as F
from bench import published
from bench.case import BOTH, Bench, CannotExpress, Case, similar_rows
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
        yield "spatial_aggregate_bwd", y, y, y, stat, stat, stat, kind, 0.5


def compiled(dtype):
    for name, y in tiles(dtype).items():
        kind, stat = name.split(" ")[0], torch.rand(y.shape[:2]) + 0.5
        yield f"aggregate forward {name}", "spatial_aggregate_fwd", y, kind, name == "cosine", 0.5
        yield f"aggregate backward {name}", "spatial_aggregate_bwd", y, y, y, stat, stat, stat, kind, 0.5


def _sdpa(case):
    """Scaled dot-product attention with the given temperatures folded into the query."""
    if case.similarity != "cosine":
        raise CannotExpress
    temperature = {}

    def run(t):
        x = t["x"]
        unit = nnf.normalize(x, dim=-1)
        if x.shape[1] not in temperature:  # not timed: the first call is the warm-up
            temperature[x.shape[1]] = _row_std(unit.detach().float()).to(x.dtype)
        query = unit / temperature[x.shape[1]]
        # with a head dimension: without one torch stores the matrix
        heads = (z[:, None] for z in (query, unit, x))
        return 0.5 * x + 0.5 * nnf.scaled_dot_product_attention(*heads, scale=1.0)[:, 0]

    return run


def _row_std(unit):
    parts = [(part @ unit.transpose(1, 2)).std(-1, keepdim=True) for part in unit.split(256, 1)]
    return torch.cat(parts, 1) + 1e-10


def _settings(c):
    return dict(similarity=c.similarity, contrast=c.similarity == "cosine")


BENCH = Bench(
    [
        *(Case("spatial_aggregate", mode, dtype, pixels, 2048)
          for dtype in ("bfloat16", "float32") for pixels in (4096, 8464) for mode in BOTH),
        Case("spatial_aggregate", "fwd+bwd", "float32", 8464, 19, "kl"),
    ],
    lambda c, n, generator: {"x": similar_rows(c, n, generator)},
    lambda c, t, b: F.spatial_aggregate(**t, **_settings(c), backend=b),
    # temperatures and tiles half each, weighted sum; backward: half the tiles, weights, values, features
    products=lambda c: 5.5 if c.backward else 2.0,
    others={"authors": lambda c: lambda t: published.spatial_aggregate(**t, **_settings(c)), "sdpa": _sdpa},
)  # fmt: skip
