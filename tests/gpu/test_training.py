"""Training and large sizes on a GPU: what a CPU cannot show. Run by `make test-gpu`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import fastuda.ops as F
from fastuda.config import resolve
from fastuda.distributed import World
from fastuda.methods import METHODS
from fastuda.trainer import Trainer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def trainer(root, out, *settings):
    plain = {"data.data_root": str(root), "data.crop": [32, 64], "data.batch_size": 2, "data.workers": 0}
    plain |= {"log.tensorboard": False, "train.device": DEVICE, "train.steps": 300, "train.baseline": "off"}
    return Trainer(resolve(None, plain | dict(settings), {}), Path(out), World(0, 1, torch.device(DEVICE)))


def losses(run, steps):
    found = []
    for _ in range(steps):
        run._train_step()
        found.append(run._take_means()["train/loss"])
    return found


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_three_steps_by_float32(method, amp, scenes_root, tmp_path):
    """Finite, begun where float32 begins (a teacher's confidence parts them later); the model moves."""
    run, plain = (
        trainer(scenes_root, tmp_path / mode, ("method.name", method), ("train.amp", mode))
        for mode in (amp, "off")
    )
    if run.scaler.is_enabled():
        run.scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    before = [p.detach().clone() for p in run.method.model.parameters()]
    found, wanted = losses(run, 3), losses(plain, 1)
    assert all(math.isfinite(x) for x in found)
    assert found[0] == pytest.approx(wanted[0], rel=0.05, abs=0.02)
    after = run.method.model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_plca_learns(scenes_root, tmp_path):
    run = trainer(scenes_root, tmp_path, ("method.name", "plca"), ("train.amp", "bf16"))
    found = losses(run, 300)
    assert all(math.isfinite(x) for x in found)
    assert sum(found[-30:]) < 0.7 * sum(found[:30])


@pytest.mark.parametrize("method", ["plca", "sepico"])
def test_resume_goes_on_from_the_checkpoint(method, scenes_root, tmp_path):
    """Sums by atomics may differ in the last bits on a GPU: near, not bitwise as on a CPU."""
    settings = (("method.name", method), ("train.amp", "bf16"))
    run = trainer(scenes_root, tmp_path / "a", *settings)
    losses(run, 3)
    (tmp_path / "a").mkdir(exist_ok=True)
    run.state.save(tmp_path / "a", "last.pt", None)
    wanted = losses(run, 2)
    other = trainer(scenes_root, tmp_path / "b", *settings)
    other.state.restore(tmp_path / "a" / "last.pt")
    assert losses(other, 2) == pytest.approx(wanted, rel=0.02, abs=0.01)


@pytest.mark.parametrize("op", ["association", "aggregation"])
def test_a_full_frame_needs_no_matrix(op):
    """32,768 pixels: one N x N array of float32 would be 4 GiB."""
    n, width = 32768, 256
    x = torch.randn(1, n, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if op == "association":
        y = torch.randn(1, n, width, device=DEVICE, dtype=torch.bfloat16)
        labels = torch.zeros(1, n, dtype=torch.int64, device=DEVICE)
        F.cycle_association_loss(x, y, labels, backend="triton")[0].backward()
    else:
        F.spatial_aggregate(x, backend="triton").float().square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_compiled_without_a_break():
    x = torch.rand(2, 96, 32, device=DEVICE) + 0.1

    def step(x):
        return F.spatial_aggregate(x, backend="triton")

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


def test_the_step_does_not_wait_for_the_device(scenes_root, tmp_path):
    run = trainer(scenes_root, tmp_path, ("method.name", "plca"), ("train.amp", "bf16"))
    losses(run, 2)
    batch = next(run.loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
