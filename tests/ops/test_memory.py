"""No N x N array, measured: the peak of the resident size; and more elements than an int32 counts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastuda.ops as F

ROOT = Path(__file__).resolve().parents[2]
N, CHANNELS = 6000, 64
SQUARE = 4 * N * N / 2**20  # MiB of one float32 N x N array: 137

PROGRAM = f"""
import sys
import torch
import fastuda.ops as F
from bench.measure import peak, start_peak

torch.manual_seed(0)
similarity, backend, *ops = sys.argv[1:]
dtype = torch.bfloat16 if similarity == "bf16" else torch.float32
similarity = "cosine" if similarity == "bf16" else similarity

def features():
    x = torch.randn(1, {N}, {CHANNELS}).to(dtype)
    return (x.softmax(-1) if similarity == "kl" else x).requires_grad_()

source, target = features(), features()
labels = torch.randint(0, 2, (1, {N}))

def run(op):
    if op == "cycle_match":
        return F.cycle_match(source, target, similarity=similarity, backend=backend)
    if op == "spatial_aggregate":
        y = F.spatial_aggregate(source, similarity=similarity, backend=backend)
        return y.float().square().sum().backward()
    loss, _ = F.cycle_association_loss(source, target, labels, similarity=similarity, backend=backend)
    loss.backward()

for op in ops:
    if backend != "reference":
        run(op)  # generated code and thread stacks stay
    before = start_peak("cpu")
    run(op)
    print(peak("cpu") - before)
"""

needs_cpp = pytest.mark.skipif(
    not any(s.usable for s in F.backends("cycle_match", torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
            if s.name == "cpu"),
    reason="the C++ kernels are not built",
)  # fmt: skip
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")


def peaks(similarity: str, backend: str, *ops: str) -> dict[str, float]:
    """MiB above what was resident before each op."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, similarity, backend, *ops], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(ops, map(float, done.stdout.split()), strict=True))


@needs_cpp
@linux
@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["cosine", "bf16", "kl"])
def test_no_square_array_at_any_time(similarity):
    found = peaks(similarity, "cpu", "cycle_match", "cycle_association_loss", "spatial_aggregate")
    limit = 64 + 8 * 4 * N * CHANNELS / 2**20
    assert limit < SQUARE and all(extra < limit for extra in found.values()), found


@linux
@pytest.mark.slow
def test_the_measurement_sees_a_square_array():
    assert peaks("cosine", "reference", "spatial_aggregate")["spatial_aggregate"] > SQUARE


def available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0


@needs_cpp
@pytest.mark.slow
@pytest.mark.skipif(available() < 14 << 30, reason="needs 14 GiB of free memory")
def test_contrast_softmax_beyond_an_int32_of_elements():
    rows, width = 32800, 65536
    assert rows * width > 2**31
    x = torch.zeros(rows, width, dtype=torch.bfloat16)
    last = torch.randn(width).to(torch.bfloat16)
    x[-1] = last
    y = F.contrast_softmax(x, backend="cpu")
    assert torch.equal(y[-1], F.contrast_softmax(last[None], backend="cpu")[0])
    assert torch.equal(y[0], torch.full((width,), 1 / width, dtype=torch.bfloat16))
