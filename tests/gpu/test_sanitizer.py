"""compute-sanitizer over every kernel on small inputs, where the tool is and takes the device.

What it says of the kernels of torch and its libraries is theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastuda.ops as F

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(330)]

ROOT = Path(__file__).parents[2]
FOLDERS = [
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    f"{os.environ.get('CUDA_HOME', '')}/bin",
]


def names(folder: str, files: str, pattern: str) -> list[str]:
    text = "".join(path.read_text() for path in sorted((ROOT / folder).glob(files)))
    return [name for name in re.findall(pattern, text) if "_" in name]  # the others are words


OURS = re.compile("|".join(
    rf"\b{name}\b"
    for name in names("kernels", "*.py", r"@triton.jit.*\ndef (\w+)")
    + names("csrc/cuda", "*.cu", r"__global__[^;{]*?(\w+)\(const")
))  # fmt: skip
LONGEST = int(os.environ.get("FASTUDA_SANITIZER_SECONDS", 140))
"""Seconds: what has found nothing by then counts as clean as far as it came."""


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_no_kernel_errs(check, dtype, backend, tmp_path):
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(FOLDERS)
    )
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    row = next(row for row in F.backends("local_affinity") if row.name == backend)
    if not row.usable:
        pytest.skip(row.reason)
    # every tensor its own allocation, so that its ends are known
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "5"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [*command, sys.executable, "-m", "tests.gpu.small", backend, dtype],
                cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=LONGEST,
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    said = log.read_text()
    finished = "every kernel ran" in said
    if "not supported" in said and not finished:
        pytest.skip("compute-sanitizer does not take this device")
    found = [line for line in said.splitlines() if line.startswith("=========") and OURS.search(line)]
    assert not found, said[-6000:]
    if code is None:
        pytest.skip(f"nothing was found in {LONGEST} s, but not every kernel ran")
    assert finished, said[-6000:]
