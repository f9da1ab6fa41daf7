"""The CUDA kernels without a GPU: their code runs on the CPU, thread by thread, and compiles for three."""

from __future__ import annotations

import ctypes
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastuda.ops.class_statistics import reference as plain_statistics
from fastuda.ops.local_affinity import reference as plain_affinity
from tests.cases import OPS
from tests.gpu.kernels import has
from tests.helpers import at, within_budget

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
RECIPE = runpy.run_path(str(CUDA / "build.py"))
SOURCES = sorted(CUDA.glob("*.cu"))


class AffinityShape(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("classes", "height", "width", "neighbours", "distance")),
    )


SIZES = [(1, 1), (1, 9), (40, 1), (2, 2), (17, 33), (35, 70)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("neighbours", "distance"), [(8, 1), (4, 1), (8, 3), (4, 16), (8, 20)])
@pytest.mark.parametrize("kind", ["kl", "product"])
def test_affinity(emulated, size, neighbours, distance, kind):
    generator = torch.Generator().manual_seed(size[0] + distance)
    p = (4 * torch.randn(2, 3, *size, generator=generator)).softmax(1)
    shape = AffinityShape(2, 3, *size, neighbours, distance)
    weight = torch.randn(2, neighbours * (1 if kind == "product" else 3), *size, generator=generator)

    def reference(dtype):
        leaf = p.to(dtype).requires_grad_()
        value = plain_affinity(leaf, neighbours, distance, kind)
        return value.detach(), torch.autograd.grad(value, leaf, weight.to(dtype))[0]

    found = torch.full(weight.shape, torch.nan), torch.full(p.shape, torch.nan)
    product = kind == "product"
    failed = emulated.fastuda_local_affinity_fwd(at(p), at(found[0]), shape, product, None)
    failed |= emulated.fastuda_local_affinity_bwd(at(weight), at(p), at(found[1]), shape, product, None)
    assert not failed
    plain, truth = reference(torch.float32), reference(torch.float64)
    for name, *three in zip(("value", "gradient"), found, plain, truth, strict=True):
        within_budget(*three, name, torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("neighbours", [4, 8])
def test_affinity_cleaning(emulated, size, neighbours):
    p = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).softmax(1)
    exact = p.double().requires_grad_()
    wanted = plain_affinity(exact, neighbours, 1, "product").sum()
    (wanted_grad,) = torch.autograd.grad(wanted, exact)
    shape = AffinityShape(2, 3, *size, neighbours, 1)
    emulated.fastuda_affinity_blocks.restype = ctypes.c_int64
    partial = torch.full((emulated.fastuda_affinity_blocks(shape),), torch.nan, dtype=torch.float64)
    total, grad = torch.full((), torch.nan), torch.full(p.shape, torch.nan)
    for wants in (grad, None):
        failed = emulated.fastuda_affinity_cleaning(at(p), at(total), at(wants), at(partial), shape, None)
        assert failed == 0
        assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-5)


class StatisticsShape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "width", "classes", "ignore"))


@pytest.mark.parametrize(
    ("n", "width", "classes"), [(0, 3, 2), (1, 1, 1), (63, 130, 5), (600, 40, 19), (513, 33, 150)]
)
def test_class_statistics(emulated, n, width, classes):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, width, generator=generator) + 3
    labels = torch.randint(-1, classes + 2, (n,), generator=generator)
    labels[::7] = 255
    shape = StatisticsShape(n, width, classes, 255)
    emulated.fastuda_statistics_partials.restype = ctypes.c_int64
    partial = torch.full((emulated.fastuda_statistics_partials(shape),), torch.nan)
    found = [torch.full(size, torch.nan) for size in ((classes,), (classes, width), (classes, width))]
    places = [at(t) for t in (x, labels, *found, partial)]
    assert emulated.fastuda_class_statistics(*places, shape, None) == 0
    plain = plain_statistics(x, labels, classes, 255)
    truth = plain_statistics(x.double(), labels, classes, 255)
    for name, *three in zip(("count", "mean", "variance"), found, plain, truth, strict=True):
        within_budget(*three, name, torch.float32)


class ConfusionShape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "classes", "h", "w", "height", "width", "ignore")),
        ("align_corners", ctypes.c_bool),
    )


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("classes", [1, 19, 150])
@pytest.mark.parametrize(
    ("low", "high"), [((1, 1), (1, 1)), ((3, 2), (33, 150)), ((9, 5), (4, 7)), ((1, 6), (18, 1))]
)
def test_upsample_confusion(emulated, low, high, classes, align):
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(2, classes, *low, generator=generator)
    labels = torch.randint(0, classes, (2, *high), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    strangers = torch.rand(labels.shape, generator=generator) < 0.1
    labels[strangers] = torch.where(torch.rand(int(strangers.sum())) < 0.5, -3, classes)
    matrix = torch.zeros(classes**2 + 1, dtype=torch.int64)
    predicted = torch.full(labels.shape, 255, dtype=torch.uint8)
    shape = ConfusionShape(2, classes, *low, *high, 255, align)
    assert emulated.fastuda_upsample_confusion(at(x), at(labels), at(matrix), at(predicted), shape, None) == 0
    full = torch.nn.functional.interpolate(x.double(), high, mode="bilinear", align_corners=align)
    assert (full.amax(1) - full.gather(1, predicted[:, None].long())[:, 0]).max() < 1e-5
    assert matrix[-1] == strangers.sum()
    keep = (labels != 255) & ~strangers
    pairs = labels[keep] * classes + predicted[keep].long()
    assert torch.equal(matrix[:-1], pairs.bincount(minlength=classes**2))


def threaded(folder, sanitizer):
    """A program that runs every kernel with threads of the system, under a sanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "threads"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-Wno-unknown-pragmas", f"-fsanitize={sanitizer}"]
    sources = ["-x", "c++", "-include", HERE / "threads_cuda.h", *SOURCES, HERE / "threads.cpp"]
    (folder / "every_op.inc").write_text(RECIPE["including"]("FASTUDA_SMALL"))
    command = [compiler, *flags, "-fno-sanitize-recover=undefined", "-I", folder, *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("the sanitizer's library is not installed")
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_kernel_errs_with_real_threads(sanitizer, tmp_path):
    program = threaded(tmp_path, sanitizer)
    done = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:  # more bits of address space than the sanitizer knows
        pytest.skip("the sanitizer does not run on this system")
    assert done.returncode == 0 and "every kernel ran" in done.stdout, done.stderr[:6000]
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr, done.stderr[:6000]
    if sanitizer == "thread":
        planted = subprocess.run([program, "without barriers"], capture_output=True, text=True)
        for file in ("local_affinity.cu", "upsample_confusion.cu", "upsampled_walk.h"):
            assert re.search(f"data race.*{file}", planted.stderr, re.DOTALL), f"{file} has no barriers"


WITH_CUDA = [op for op in OPS if has(op, "cuda")]

STAND_IN = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** s) { *s = nullptr; return 0; }'

REGISTERED = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch, fastuda.ops
from fastuda.ops import _backends
torch.ops.load_library(sys.argv[2])
_backends.CUDA_ERROR = ""
torch.cuda.is_available = lambda: True
x = torch.empty(1, 3, 4, 5)
for op in sys.argv[3:]:
    row = next(row for row in _backends.BACKENDS[op] if row.name == "cuda")
    assert row.refusal() == "", (op, row.refusal())
    assert row.refusal(x) == "needs tensors on cuda, not on cpu", row.refusal(x)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The whole library, linked against a stand-in for the part of torch that a CPU build lacks."""
    compiler = RECIPE["nvcc"]()
    if compiler is None:
        pytest.skip("no nvcc")
    from torch.utils.cpp_extension import include_paths, library_paths

    work = tmp_path_factory.mktemp("cuda")
    (work / "stand_in.cpp").write_text(STAND_IN)
    name = "libtorch_cuda.so"
    options = ["-shared", "-fPIC", "-x", "c++", f"-Wl,-soname,{name}"]
    subprocess.run(["g++", *options, work / "stand_in.cpp", "-o", work / name], check=True)
    links = [f"-L{path}" for path in (work, *library_paths())] + ["-ltorch_cuda", "-ltorch_cpu"]
    listed = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    archs = [arch for arch in ARCHS if f"sm_{arch}" in listed.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTUDA_CUDA_ARCH", ";".join(archs))
        said = RECIPE["build"](compiler, work, work / "_cuda.so", include_paths(), links)
    return work, said, archs


ARCHS = ("80", "90", "120")

SPILLS = {
    ("sm_120", "strip_moments"): 8, ("sm_120", "affinity_backward"): 4,
    ("sm_120", "product_backward"): 24, ("sm_120", "count_strips"): 240,
}  # fmt: skip
"""Bytes that are known to spill. The launch bounds of these kernels allow 64 or 80 registers a thread, and
nvcc 13.0 needs a few more for sm_120. The library has no code for sm_120: there the driver compiles the PTX
of sm_90."""


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_kernels_compile_without_warnings_or_spills(built):
    _, said, archs = built
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    kernels = re.findall(r"Compiling entry function '(\S+)' for '(sm_\d+)'", said)
    assert {arch for _, arch in kernels} == {f"sm_{arch}" for arch in archs}
    assert len(spills) == len(kernels) > 0
    for (name, arch), spilled in zip(kernels, spills, strict=True):
        known = (most for (gpu, kernel), most in SPILLS.items() if gpu == arch and kernel in name)
        assert max(map(int, spilled)) <= next(known, 0), (name, arch, spilled)


@pytest.mark.slow
@pytest.mark.xdist_group("nvcc")
def test_library_loads_and_registers_its_kernels(built):
    work, *_ = built
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED, work / "libtorch_cuda.so", work / "_cuda.so", *WITH_CUDA],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_kernels_know_nothing_of_torch():
    texts = {path: path.read_text() for path in (ROOT / "csrc").glob("*_math.h")}
    for path in (*SOURCES, *CUDA.glob("*.h")):
        declared, _, rest = path.read_text().partition("\n#if defined(FASTUDA_TORCH)\n")
        texts[path] = declared + rest.partition("\n#elif ")[2]
        assert path not in SOURCES or "registration.h" in rest
    del texts[CUDA / "registration.h"]
    for path, text in texts.items():
        assert not re.search(r"#include\s*(<(torch|ATen|c10)|\"registration)|\bTensor\b", text), path
