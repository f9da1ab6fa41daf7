"""Implementations to compare: fastuda, its reference, the authors' formulation, torch.compile, SDPA,
KeOps, FAISS; on a GPU also fastuda's second backend, and fastuda as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

import fastuda.ops as F
from bench import published
from bench.registry import DILATIONS, Case

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


class CannotExpress(Exception):
    """The provider cannot express this op, mode or dtype."""


def _prototypes(t: Inputs) -> F.ClassStatistics:
    return F.ClassStatistics(t["labels"].new_ones(19), t["mean"], t["variance"])


def _eightfold(t: Inputs) -> tuple[int, int]:
    return 8 * t["x"].shape[2], 8 * t["x"].shape[3]


OPS: dict[str, Callable[[Inputs, str], Tensor]] = {
    "upsample_cross_entropy": lambda t, b: F.upsample_cross_entropy(t["x"], t["labels"], backend=b),
    "lovasz_softmax": lambda t, b: F.lovasz_softmax(t["x"], t["labels"], from_logits=True, backend=b),
    "upsample_confusion": lambda t, b: F.upsample_confusion(t["x"], t["labels"], backend=b).to(t["x"].dtype),
    "domain_cross_entropy": lambda t, b: F.domain_cross_entropy(
        t["x"], t["seg"], encode="target", size=_eightfold(t), backend=b
    ),
    "local_affinity": lambda t, b: F.local_affinity(t["x"], backend=b),
    "class_statistics": lambda t, b: F.class_statistics(t["x"], t["labels"], 19, backend=b).variance,
    "prototype_contrast": lambda t, b: F.prototype_contrast(
        t["x"], t["labels"], _prototypes(t), tau=0.1, backend=b
    ),
    "smooth_max_pool": lambda t, b: F.smooth_max_pool(t["x"], backend=b),
    "category_pool": lambda t, b: F.category_pool(t["x"], t["seg"], backend=b),
    "depthwise_conv2d": lambda t, b: F.depthwise_conv2d(
        t["x"], t["weight"], padding=4, dilation=4, backend=b
    ),
    "aspp": lambda t, b: F.aspp(t["x"], t["weight"].unbind(), dilations=DILATIONS, backend=b),
}
"""Each memory-bound op of fastuda on one backend."""


def public(case: Case, backend: str) -> Run:
    """The op of fastuda on one backend."""
    if case.op == "cycle_match":
        return lambda t: torch.cat(
            F.cycle_match(t["source"], t["target"], similarity=case.similarity, backend=backend)[2:], 1
        )
    if case.op == "cycle_association_loss":
        return lambda t: F.cycle_association_loss(
            t["source"], t["target"], t["labels"], similarity=case.similarity, backend=backend
        )[0]
    if case.op in OPS:
        return lambda t: OPS[case.op](t, backend)
    if case.op == "spatial_aggregate":
        contrast = case.similarity == "cosine"
        return lambda t: F.spatial_aggregate(
            t["x"], similarity=case.similarity, contrast=contrast, backend=backend
        )
    return lambda t: F.contrast_softmax(t["x"], backend=backend)


def authors(case: Case) -> Run:
    """The authors' formulation, which stores every matrix in the inputs' dtype; see
    :mod:`bench.published`."""

    runs: dict[str, Run] = {
        "spatial_aggregate": lambda t: published.spatial_aggregate(
            t["x"], similarity=case.similarity, contrast=case.similarity == "cosine"
        ),
        "cycle_association_loss": lambda t: published.cycle_association_loss(
            t["source"], t["target"], t["labels"], similarity=case.similarity
        )[0],
        "domain_cross_entropy": lambda t: published.domain_cross_entropy(
            t["x"], t["seg"], encode="target", size=_eightfold(t)
        ),
        "class_statistics": lambda t: published.class_statistics(t["x"], t["labels"], 19).variance,
        "prototype_contrast": lambda t: published.prototype_contrast(
            t["x"], t["labels"], _prototypes(t), tau=0.1
        ),
    }
    if case.op not in runs:
        raise CannotExpress
    return runs[case.op]


def sdpa(case: Case) -> Run:
    """Scaled dot-product attention with the given temperatures folded into the query."""
    if case.op != "spatial_aggregate" or case.similarity != "cosine":
        raise CannotExpress
    temperature: dict[int, Tensor] = {}

    def run(t: Inputs) -> Tensor:
        x = t["x"]
        unit = nnf.normalize(x, dim=-1)
        if x.shape[1] not in temperature:  # not timed: the first call is the warm-up
            temperature[x.shape[1]] = _row_std(unit.detach().float()).to(x.dtype)
        query = unit / temperature[x.shape[1]]
        # with a head dimension: without one torch stores the matrix
        heads = (z[:, None] for z in (query, unit, x))
        return 0.5 * x + 0.5 * nnf.scaled_dot_product_attention(*heads, scale=1.0)[:, 0]

    return run


def _row_std(unit: Tensor) -> Tensor:
    parts = [(part @ unit.transpose(1, 2)).std(-1, keepdim=True) for part in unit.split(256, 1)]
    return torch.cat(parts, 1) + 1e-10


def faiss_flat(case: Case) -> Run:
    """Both hops with an exact inner-product index (FAISS)."""
    if case.op != "cycle_match" or case.dtype != "float32" or case.similarity != "cosine":
        raise CannotExpress
    try:
        import faiss
    except ImportError as error:
        raise CannotExpress("faiss is not installed") from error

    def hop(query: Tensor, key: Tensor) -> Tensor:
        index = faiss.IndexFlatIP(key.shape[-1])
        index.add(key.numpy())
        return torch.from_numpy(index.search(query.numpy(), 1)[0][:, 0])

    def run(t: Inputs) -> Tensor:
        source, target = (nnf.normalize(t[name], dim=-1)[0] for name in ("source", "target"))
        return torch.cat([hop(source, target), hop(target, source)])[None]

    return run


def keops(case: Case) -> Run:
    """Both hops with a symbolic matrix (KeOps)."""
    if case.op != "cycle_match" or case.dtype != "float32" or case.similarity != "cosine":
        raise CannotExpress
    try:
        from pykeops.torch import LazyTensor
    except ImportError as error:
        raise CannotExpress("pykeops is not installed") from error

    def run(t: Inputs) -> Tensor:
        a, b = (nnf.normalize(t[name], dim=-1) for name in ("source", "target"))
        product = (LazyTensor(a[:, :, None]) * LazyTensor(b[:, None])).sum(-1)
        return torch.cat([product.max(dim=2)[..., 0], product.max(dim=1)[..., 0]], 1)

    return run


def compiled(case: Case) -> Run:
    """The reference compiled with torch.compile."""
    torch._dynamo.reset()  # otherwise earlier cases count as recompilations, whose number is limited
    return torch.compile(public(case, "reference"), dynamic=False)


def second(case: Case, name: str) -> Run:
    """A usable backend of fastuda, on a GPU one that ``auto`` does not take."""
    op = public(case, name)

    def run(t: Inputs) -> Tensor:
        floats = [x for x in t.values() if x.is_floating_point()]
        usable = [row.name for row in F.backends(case.op, *floats[:2]) if row.usable]
        if name not in usable[int(name == "triton") :]:
            raise CannotExpress(f"{case.op} has no second backend {name} here")
        return op(t)

    return run


def graph(case: Case) -> Run:
    """fastuda on a GPU as a CUDA graph, which :mod:`bench.measure` captures and replays, so that host time
    does not count."""
    op = public(case, "auto")

    def run(t: Inputs) -> Tensor:
        if not next(iter(t.values())).is_cuda or case.op == "upsample_confusion":
            raise CannotExpress("graphs are of CUDA, and of ops that raise nothing the labels tell")
        return op(t)

    return run


PROVIDERS: dict[str, Callable[[Case], Run]] = {
    "fastuda": lambda case: public(case, "auto"),
    "reference": lambda case: public(case, "reference"),
    "authors": authors,
    "compile": compiled,
    "sdpa": sdpa,
    "graph": graph,
    "triton": lambda case: second(case, "triton"),
    "library": lambda case: second(case, "library"),
    "keops": keops,
    "faiss": faiss_flat,
}
