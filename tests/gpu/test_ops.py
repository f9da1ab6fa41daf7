"""Every op and every GPU backend against the reference in float64, forward and backward; needs a GPU.

`make test-gpu` runs this folder with the machine's own Python: torch and pytest are enough to collect it.
"""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

import fastuda.ops as F
from fastuda.ops import _backends
from tests.gpu.cases import (
    CASES,
    CUDA,
    DEVICE,
    DOMAIN_LOGITS,
    DTYPES,
    HEAD,
    LOGITS,
    PROBABILITIES,
    TRITON,
    WIDE,
    classes_of,
    features,
    normal,
    wide,
)
from tests.helpers import as_good_match, within_budget

pytestmark = pytest.mark.gpu


def require(op: str, backend: str, x: torch.Tensor) -> None:
    """Skip where the backend is not installed or not built; fail where it is and will not run."""
    row = next(row for row in F.backends(op, x) if row.name == backend)
    if "not installed" in row.reason or "are not built" in row.reason:
        pytest.skip(row.reason)
    assert row.usable, row.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "backend"),
    [(name, "triton") for name in sorted(TRITON)] + [(name, "cuda") for name in sorted(CUDA & set(CASES))],
)
def test_value_and_gradient(case, backend, dtype):
    op, x, function = CASES[case]
    x = x.to(DEVICE, dtype)
    require(op, backend, x)
    judge(function, x, backend, dtype)


def judge(function, x, backend, dtype):
    """Value and gradient against float64, and against themselves."""

    def run(name, work):
        leaf = x.to(work, copy=True).requires_grad_()
        value = function(leaf, name)
        weight = torch.linspace(-1, 2, value.numel(), device=DEVICE).reshape(value.shape).to(value.dtype)
        return value.detach(), torch.autograd.grad(value, leaf, weight)[0]

    found, plain, truth = run(backend, dtype), run("reference", dtype), run("reference", torch.float64)
    again = run(backend, dtype)
    for name, *three in zip(("value", "gradient"), found, plain, truth, strict=True):
        # the ops that give the input's dtype round their value to it
        within_budget(*three, name, dtype if three[0].dtype == dtype else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", sorted(WIDE))
@pytest.mark.parametrize(("backend", "width"), [("triton", 256), ("library", 512)])
def test_many_panels_of_whole_tiles(backend, width, op, dtype, monkeypatch):
    """The loads and the panels of training, which need widths of whole tiles and more rows than fit one."""
    x = wide(1500, 0, width).to(DEVICE, dtype)
    require(op, backend, x)
    for module in ("_panels", "_search", "_temperature"):
        monkeypatch.setattr(f"fastuda.kernels.{module}.PANEL_BYTES", 1 << 16)
    judge(WIDE[op], x, backend, dtype)


def test_the_cuda_kernels_are_built_where_they_can_be():
    """A build that fails leaves them out without an error, so that the rest can be used."""
    recipe = Path(__file__).parents[2] / "csrc" / "cuda" / "build.py"
    if runpy.run_path(str(recipe))["nvcc"]() is None:
        pytest.skip("there is no nvcc")
    assert not _backends.CUDA_ERROR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["cosine", "kl"])
@pytest.mark.parametrize(("backend", "width"), [("triton", 19), ("library", 512)])
def test_match(backend, width, kind, dtype):
    source, target = (normal(2, n, width, seed=n).to(DEVICE, dtype) for n in (97, 130))
    if kind == "kl":
        source, target = source.softmax(-1), target.softmax(-1)
    require("cycle_match", backend, source)
    match = F.cycle_match(source, target, similarity=kind, backend=backend)
    s, t = source.double(), target.double()
    if kind == "cosine":
        sim = torch.nn.functional.normalize(s, dim=-1) @ torch.nn.functional.normalize(t, dim=-1).mT
    else:
        sim = s @ (t + 1e-10).log().mT
    as_good_match(match.forward_index, sim, 1e-5)
    assert match.backward_index.shape == target.shape[:2]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.parametrize("align", [False, True])
def test_confusion(classes, align, dtype, backend):
    x = normal(2, classes, 11, 17).to(DEVICE, dtype)
    if backend == "cuda" and "confusion" not in CUDA:
        pytest.skip("no CUDA kernel")
    require("upsample_confusion", backend, x)
    labels = classes_of(2, 61, 93, classes=classes)
    matrix, predicted = F.upsample_confusion(
        x, labels, align_corners=align, return_labels=True, backend=backend
    )
    full = torch.nn.functional.interpolate(x.double(), (61, 93), mode="bilinear", align_corners=align)
    assert (full.amax(1) - full.gather(1, predicted[:, None].long())[:, 0]).max() < 1e-5
    keep = labels != 255
    pairs = labels[keep] * classes + predicted[keep].long()
    assert torch.equal(matrix, pairs.bincount(minlength=classes**2).reshape(classes, classes))
    labels[0, 0, 0] = classes + 1
    with pytest.raises(ValueError, match="labels hold classes outside"):
        F.upsample_confusion(x, labels, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width", "classes"), [(1, 1, 1), (2000, 97, 19), (700, 130, 150)])
def test_statistics(n, width, classes, dtype, backend):
    x = (normal(n, width) + 3).to(DEVICE, dtype)
    if backend == "cuda" and "statistics" not in CUDA:
        pytest.skip("no CUDA kernel")
    require("class_statistics", backend, x)
    labels = classes_of(n, classes=classes)
    found, plain = (F.class_statistics(x, labels, classes, backend=b) for b in (backend, "reference"))
    truth = F.class_statistics(x.double(), labels, classes, backend="reference")
    for name in ("count", "mean", "variance"):
        within_budget(*(getattr(run, name) for run in (found, plain, truth)), name, torch.float32)


def operators(backend):
    """The registered operators with small arguments, by name; forwards before their backwards."""
    x, p = torch.rand(2, 20, 8, device=DEVICE), torch.rand(2, 20, 4, device=DEVICE).softmax(-1)
    stat = torch.rand(2, 20, device=DEVICE) + 0.5
    index = torch.randint(0, 20, (2, 20), device=DEVICE)
    residuals = (stat, stat, index, index, stat, stat, stat, stat)
    z, labels = torch.randn(2, 4, 3, 5, device=DEVICE), classes_of(2, 6, 9, classes=4)
    pair, plane, mean = torch.randn(2, 8, 3, 5, device=DEVICE), torch.rand(2, 4, device=DEVICE), x[0, :4]
    features, classes = x[0], classes_of(20, classes=4)
    pooled, share = torch.rand(2, 4, 8, device=DEVICE), torch.rand(20, 4, device=DEVICE)
    bank, count = torch.rand(4, 5, 8, device=DEVICE), torch.full((4,), 5, device=DEVICE)
    maps = torch.rand(2, 32, 3, 5, device=DEVICE)
    found = [
        ("local_affinity_fwd", (z.softmax(1), 8, 1, False)),
        ("local_affinity_bwd", (maps, z.softmax(1), 8, 1, False)),
        ("affinity_cleaning_loss_fwd", (z.softmax(1), 8, True)),
        ("class_statistics_fwd", (features, classes, 4, 255)),
        ("upsample_confusion_fwd", (z, labels, False, 255)),
    ]
    if backend == "cuda":
        return found
    return [
        *found,
        ("cycle_match_fwd", (x, x, "cosine")),
        ("cycle_association_loss_fwd", (x, x, "cosine", True)),
        ("cycle_association_loss_bwd", (x, x, *residuals, "cosine")),
        ("spatial_aggregate_fwd", (p, "kl", True, 0.5)),
        ("spatial_aggregate_bwd", (x, x, x, stat, stat, "cosine", 0.5)),
        ("contrast_softmax_fwd", (p, 1e-10)),
        ("contrast_softmax_bwd", (p, p, stat)),
        ("upsample_cross_entropy_fwd", (z, labels, None, None, False, 1.0, 255, 0.0, True, False)),
        ("lovasz_softmax_fwd", (z, labels, True, False, 255, True)),
        ("domain_cross_entropy_fwd", (pair, z, 4, 6, 9, True, 1.8, 0.9, None, True)),
        ("smooth_max_pool_fwd", (z, 1.0)),
        ("smooth_max_pool_bwd", (plane, z, plane, 1.0)),
        ("prototype_contrast_fwd", (features, classes, mean, mean, 1.0, 255)),
        ("prototype_contrast_bwd", (plane[0, 0], features, classes, share, mean, mean, 1.0, 255)),
        ("prototype_contrast_bank_fwd", (features, classes, bank, count, 1.0, 255, True)),
        ("category_pool_fwd", (x, p)),
        ("category_pool_bwd", (pooled, x, p, pooled, plane, True, True)),
        ("aspp_fwd", (z, torch.rand(2, 3, 3, 4, 4, device=DEVICE), plane[0], [1, 2])),
        ("aspp_bwd", (z, z, torch.rand(2, 3, 3, 4, 4, device=DEVICE), [1, 2], True, True)),
    ]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_opcheck(backend):
    require("local_affinity", backend, LOGITS.to(DEVICE))
    for name, args in operators(backend):
        torch.library.opcheck(_backends.overload(name, backend), args)


def steps():
    """Ops with all that they take on the GPU already, forward and backward, by name."""
    labels, many = classes_of(2, 97, classes=3), classes_of(2, 61, 93)
    target, scores = features(130, seed=1).to(DEVICE), (4 * normal(2, 19, 9, 14, seed=4)).to(DEVICE)
    return {
        "association": (features(97), lambda x: F.cycle_association_loss(x, target, labels)[0]),
        "aggregation": (features(97), F.spatial_aggregate),
        "predictions": (features(97).softmax(-1), partial(F.spatial_aggregate, similarity="kl")),
        "entropy": (LOGITS, lambda x: F.upsample_cross_entropy(x, many)),
        "lovasz": (LOGITS, lambda x: F.lovasz_softmax(x, many, from_logits=True)),
        "domain": (
            DOMAIN_LOGITS,
            lambda x: F.domain_cross_entropy(x, scores, encode="source", size=(61, 93)),
        ),
        "affinity": (PROBABILITIES, F.local_affinity),
        "cleaning": (PROBABILITIES, F.affinity_cleaning_loss),
        "pooling": (LOGITS, F.smooth_max_pool),
        "head": (
            normal(2, 40, 33, 50, seed=12),
            partial(F.aspp, weights=[w.to(DEVICE) for w in HEAD], dilations=(6, 12, 18, 24)),
        ),
    }


STEPS = ("association", "aggregation", "predictions", "entropy", "lovasz", "domain", "affinity", "cleaning",
         "pooling", "head")  # fmt: skip


def stepped(function, x):
    value = function(x)
    return value, torch.autograd.grad(value.float().square().sum(), x)[0]


@pytest.mark.parametrize("name", STEPS)
def test_a_graph_and_another_stream_give_the_same(name):
    """A step that asked the device for a number could not be captured."""
    x, function = steps()[name]
    x = x.to(DEVICE).requires_grad_()
    wanted = stepped(function, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            found = stepped(function, x)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = stepped(function, x)
    for part in found:
        part.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_compiled_without_a_break(name):
    x, function = steps()[name]
    x = x.to(DEVICE).requires_grad_()
    # what inductor makes of the torch around the ops is not in question but for one of them
    backend = "inductor" if name == "aggregation" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for found, wanted in zip(stepped(compiled, x), stepped(function, x), strict=True):
        torch.testing.assert_close(found, wanted)
