"""Half precision: near float32 over many steps, float32 where a term needs it, and fp16's loss scale."""

import shutil

import pytest
import torch

from fastuda.config import OptimConfig
from fastuda.optim import build_optimizer
from tests.program import TINY, curves, equal, fastuda, state, without_clocks


@pytest.mark.parametrize("impl", ["auto", "foreach"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(name, impl):
    """The first two of three steps overflow: the third is that of an optimiser that has met no other."""
    nets = [torch.nn.Linear(64, 64) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    found = []
    for net, overflows in zip(nets, (2, 0), strict=True):
        optimizer = build_optimizer(OptimConfig(name=name, impl=impl, lr=0.1), net)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (6 + overflows))
        for step in range(overflows + 3):
            optimizer.zero_grad()
            scaler.scale(net(torch.ones(2, 64)).square().mean()).backward()
            if step < overflows:
                net.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        found.append(optimizer.state_dict()["state"])
    assert torch.equal(nets[0].weight, nets[1].weight) and equal(*found)


def test_a_parameter_may_meet_its_first_gradient_late():
    net = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    optimizer = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.0), net)
    for used in (1, 2, 2):
        optimizer.zero_grad()
        sum(part(torch.ones(1, 2)).sum() for part in net[:used]).backward()
        optimizer.step()
    momentum = [optimizer.state[part.bias]["momentum_buffer"] for part in net]
    torch.testing.assert_close(momentum[0], torch.full((2,), 1 + 0.9 + 0.81))
    torch.testing.assert_close(momentum[1], torch.full((2,), 1 + 0.9))


STEEP = """
from fastuda.methods import Phase
from fastuda.methods.source_only import SourceOnly

class Steep(SourceOnly):
    factor = 2.0**6
    def phases(self, batch, step):
        for phase in super().phases(batch, step):
            # only its gradient is large: the step that is taken at last is an ordinary one
            loss = phase.losses["ce"]
            yield Phase("model", {"ce": loss * self.factor})

class Endless(Steep):
    factor = 2.0**60
"""


def arguments(root, out, method, *more):
    return ["--method", f"steep:{method}", "--data-root", root, "--out", out, "--quiet", "--amp", "fp16",
            *TINY, "--crop", 16, 16, "--batch-size", 1, "log.every=1", "optim.lr=1e-6", *more]  # fmt: skip


@pytest.fixture
def steep(tmp_path, monkeypatch):
    (tmp_path / "steep.py").write_text(STEEP)
    monkeypatch.syspath_prepend(tmp_path)


def test_gradients_that_overflow_float16_shrink_the_scale(steep, scenes_root, tmp_path):
    """Steps are skipped until the scale fits, nothing else is lost, and a resumed run knows the scale."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = ["--steps", 20, "checkpoint.every=1", "checkpoint.keep=30"]
    done = fastuda("train", *arguments(scenes_root, whole, "Steep", *more))
    assert done.returncode == 0 and "fp16 is slow on a CPU" in done.stderr, done.stderr
    scales = [float(value) for _, name, value in curves(whole) if name == "train/loss_scale"]
    assert 1 <= scales[-1] < scales[0] <= 32768 and scales[-1] == scales[-2]
    first, last = state(whole, "step_0000001.pt"), state(whole)
    assert all(torch.isfinite(v).all() for v in last["method"].values())
    weights = [name for name in last["method"] if ".head." in name]
    assert weights and not torch.equal(first["method"][weights[0]], last["method"][weights[0]])
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step_0000003.pt", out / "checkpoints" / "last.pt")
    shutil.copy(whole / "metrics.csv", out)
    resumed = fastuda("train", *arguments(scenes_root, out, "Steep", *more, "--resume", "auto"))
    assert resumed.returncode == 0, resumed.stderr
    assert equal(without_clocks(state(whole)), without_clocks(last)) and curves(whole) == curves(out)


def test_gradients_that_overflow_at_every_scale_stop_the_run(steep, scenes_root, tmp_path):
    args = arguments(scenes_root, tmp_path / "run", "Endless", "--steps", 40, "checkpoint.every=5")
    done = fastuda("train", *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: step 17: the gradients overflow float16" in done.stderr and "--amp bf16" in done.stderr
    assert all(torch.isfinite(v).all() for v in state(tmp_path / "run")["method"].values())
