"""Every op and every GPU backend against the reference in float64, forward and backward; needs a GPU.

`make test-gpu` runs this folder with the machine's own Python: torch and pytest are enough to collect it.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import fastuda.ops as F
from fastuda.ops import _backends
from tests.cases import OPS, case, every
from tests.cases._inputs import classes_of, normal
from tests.gpu.kernels import DEVICE, DTYPES, has
from tests.helpers import as_good_match, judge, value_and_gradient

pytestmark = pytest.mark.gpu


def require(op: str, backend: str, x: torch.Tensor) -> None:
    """Skip where the backend is not installed or not built; fail where it is and will not run."""
    row = next(row for row in F.backends(op, x) if row.name == backend)
    if "not installed" in row.reason or "are not built" in row.reason:
        pytest.skip(row.reason)
    assert row.usable, row.reason


SAMPLES = [(op, name) for op, name, *_ in every("samples", "cpu")]


def sample(op, name):
    """Its input and its function, with all else that it takes on the GPU already."""
    return next(rest for found, *rest in case(op).samples(DEVICE) if found == name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "name", "backend"),
    [(*these, backend) for backend in ("triton", "cuda") for these in SAMPLES if has(these[0], backend)],
)
def test_value_and_gradient(op, name, backend, dtype):
    x, function = sample(op, name)
    x = x.to(DEVICE, dtype)
    require(op, backend, x)
    judge_twice(function, x, backend, dtype)


def judge_twice(function, x, backend, dtype):
    """Value and gradient against float64, and against themselves."""
    found, again = (value_and_gradient(function, x, backend, dtype) for _ in range(2))
    judge(function, x, found)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS if hasattr(case(op), "wide")])
@pytest.mark.parametrize(("backend", "width"), [("triton", 256), ("library", 512)])
def test_many_panels_of_whole_tiles(backend, width, op, dtype, monkeypatch):
    """The loads and the panels of training, which need widths of whole tiles and more rows than fit one."""
    ((x, function),) = case(op).wide(width, DEVICE)
    x = x.to(DEVICE, dtype)
    require(op, backend, x)
    for module in ("_panels", "_search", "_moments", "_temperature"):
        monkeypatch.setattr(f"fastuda.kernels.{module}.PANEL_BYTES", 1 << 16)
    judge_twice(function, x, backend, dtype)


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
    require("upsample_confusion", backend, x)
    labels = classes_of(2, 61, 93, classes=classes).to(DEVICE)
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


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for backend in ("triton", "cuda") for op in OPS if has(op, backend)]
)
def test_opcheck(op, backend):
    require(op, backend, torch.zeros(1, 1, 1, device=DEVICE))
    for name, *args in case(op).operators(DEVICE):
        torch.library.opcheck(_backends.overload(name, backend), tuple(args))


STEPS = [(op, name) for op, name in SAMPLES if getattr(case(op), "GRADIENTS", 1)]


def stepped(function, x):
    value = function(x, "auto")
    return value, torch.autograd.grad(value.float().square().sum(), x)[0]


@pytest.mark.parametrize(("op", "name"), STEPS)
def test_a_graph_and_another_stream_give_the_same(op, name):
    """A step that asked the device for a number could not be captured."""
    x, function = sample(op, name)
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


@pytest.mark.parametrize(("op", "name"), STEPS)
def test_compiled_without_a_break(op, name):
    x, function = sample(op, name)
    x = x.to(DEVICE).requires_grad_()
    # what inductor makes of the torch around the ops is not in question but for one of them
    backend = "inductor" if name == "aggregation" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for found, wanted in zip(stepped(compiled, x), stepped(function, x), strict=True):
        torch.testing.assert_close(found, wanted)
