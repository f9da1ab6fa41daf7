"""Tiny runs for the tests of the engine."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from fastuda.config.resolve import resolve
from fastuda.engine.trainer import Trainer
from fastuda.system.distributed import World
from tests.program import TINY


def arguments(root, out, *more):
    """Words of a tiny run of three steps that writes a checkpoint after each."""
    return ["--method", "plca", "--data-root", root, "--out", out, "--steps", 3, "--quiet", *TINY,
            "checkpoint.every=1", *more]  # fmt: skip


def refused(done, *words):
    """The command ended with one clear line that has these words."""
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def wait_for_checkpoint(out, process):
    """Until the run of ``process`` has written its first checkpoint."""
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last.pt").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def trainer(root, out, *settings):
    """A trainer of a tiny run on the CPU."""
    plain = {"data.data_root": str(root), "data.crop": [32, 64], "data.batch_size": 2, "data.workers": 0}
    plain |= {"log.tensorboard": False, "train.device": "cpu", "train.steps": 4, "train.baseline": "off"}
    return Trainer(resolve(None, plain | dict(settings), {}), Path(out), World(0, 1, torch.device("cpu")))
