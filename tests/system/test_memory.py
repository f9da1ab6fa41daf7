"""Freed memory that stays with the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastuda.config.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys, torch
from bench.measure import resident
from fastuda.system.memory import give_back_freed_memory, keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
first = torch.ones(1 << 20)
before = resident("VmRSS")
large = torch.ones(64 << 20)
assert resident("VmRSS") - before > 200
del large
print(resident("VmRSS") - before)
give_back_freed_memory()
print(resident("VmRSS") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("mode", "kept"), [("keep", True), ("default", False)])
def test_freed_memory_stays_where_it_is_told_to(mode, kept):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], cwd=ROOT, capture_output=True, text=True, check=True
    )
    freed, given_back = map(float, done.stdout.split())
    assert (freed > 200) is kept and given_back < 50


def test_training_keeps_it_by_default():
    assert resolve(None, {}, {}).train.keep_memory
    assert not resolve(None, {"train.keep_memory": False}, {}).train.keep_memory
