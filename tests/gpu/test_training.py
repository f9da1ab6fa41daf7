"""Training and large sizes on a GPU: what a CPU cannot show. Run by `make test-gpu`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import fastuda.ops as F
from fastuda.config.resolve import resolve
from fastuda.engine.trainer import Trainer
from fastuda.methods import METHODS
from fastuda.system.distributed import World
from tests.engine.precision import BAND, drift, nudge

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LARGE = pytest.mark.xdist_group("large")
"""What takes much memory runs in one process, one after the other."""


def trainer(root, out, *settings, device=DEVICE):
    plain = {"data.data_root": str(root), "data.crop": [32, 64], "data.batch_size": 2, "data.workers": 0}
    plain |= {"log.tensorboard": False, "train.device": device, "train.steps": 300, "train.baseline": "off"}
    return Trainer(resolve(None, plain | dict(settings), {}), Path(out), World(0, 1, torch.device(device)))


def losses(run, steps):
    found = []
    for _ in range(steps):
        run.step()
        found.append(run.take_means()["train/loss"])
    return found


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_three_steps_by_float32(method, amp, scenes_root, tmp_path):
    """Finite, begun where float32 begins (a teacher's confidence parts them later); the model moves."""
    chosen = ("method.name", method)
    # one after the other: a trainer seeds the draws of the steps that follow
    plain = trainer(scenes_root, tmp_path / "off", chosen, ("train.amp", "off"))
    (wanted,) = losses(plain, 1)
    run = trainer(scenes_root, tmp_path / amp, chosen, ("train.amp", amp))
    if run.scaler.is_enabled():
        run.scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
        run.guard.scaler = run.state.scaler = run.scaler
    before = [p.detach().clone() for p in run.method.model.parameters()]
    found = losses(run, 3)
    assert all(math.isfinite(x) for x in found)
    assert found[0] == pytest.approx(wanted, rel=0.05, abs=0.02)
    after = run.method.model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_plca_lands_where_the_cpu_lands(scenes_root, tmp_path):
    """300 steps in bf16 against float32 on the CPU: within the band of 50-step means, or as far as float32 is
    from itself after weights that begin 0.1% apart."""
    chosen = (("method.name", "plca"), ("data.crop", [32, 32]), ("data.batch_size", 1))
    steps = 300

    def cpu():
        return trainer(scenes_root, tmp_path, *chosen, ("train.amp", "off"), device="cpu")

    found = torch.tensor(losses(trainer(scenes_root, tmp_path, *chosen, ("train.amp", "bf16")), steps))
    exact = torch.tensor(losses(cpu(), steps))
    away = drift(exact, found)
    assert away <= BAND or away <= drift(exact, torch.tensor(losses(nudge(cpu(), 0), steps)))
    assert found[-50:].mean() < 0.95 * found[:50].mean()


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


@LARGE
@pytest.mark.parametrize("op", ["association", "aggregation"])
def test_a_full_frame_needs_no_matrix(op):
    """32,768 pixels, forward and backward, above the inputs: one N x N array of float32 would be 4 GiB."""
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
    assert torch.cuda.max_memory_allocated() - before <= 512 << 20


@pytest.mark.parametrize("method", [*sorted(METHODS), "plca+self_training"])
def test_the_step_does_not_wait_for_the_device(method, scenes_root, tmp_path):
    """But for data and logs."""
    every_term = [("method.contrast_start", 0)] if method == "sepico" else []
    if method in ("self_training", "sepico"):
        every_term += [("method.mask_ratio", 0.7)]
    run = trainer(scenes_root, tmp_path, ("method.name", method), ("train.amp", "bf16"), *every_term)
    losses(run, 2)
    batch = next(run.loader).to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def memory():
    """Gives back what a test took: the others share the card."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@LARGE
def test_addresses_beyond_two_billion(memory):
    """The last rows and planes of arrays of more than 2^31 elements are those of small arrays."""
    x = torch.randn(66000, 32768, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(F.contrast_softmax(x, backend="triton")[-3:], F.contrast_softmax(x[-3:].clone()))
    x = x.view(1, -1, 2048)
    target = torch.randn(1, 200, 2048, device=DEVICE, dtype=torch.bfloat16)
    match = F.cycle_match(x, target, backend="triton")
    last = F.cycle_match(x[:, -200:].clone(), target, backend="triton")
    assert torch.equal(match.forward_index[:, -200:], last.forward_index)
    planes = x.view(1, 2, -1, 32768)
    pooled = F.smooth_max_pool(planes, backend="triton")
    assert torch.equal(pooled[0, 1], F.smooth_max_pool(planes[:, 1:].clone(), backend="triton")[0, 0])


@LARGE
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_maps_beyond_two_billion(memory, backend):
    p = torch.rand(1, 17, 4096, 4096, device=DEVICE)
    maps = F.local_affinity(p, backend=backend)
    last = F.local_affinity(p[:, -1:].clone(), backend=backend)
    assert torch.equal(maps[0, -1], last[0, -1])
