"""Half precision: near float32 over many steps, float32 where a term needs it, and fp16's loss scale."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastuda.config.schema import OptimConfig
from fastuda.engine.optim import build_optimizer
from fastuda.methods import METHODS
from tests.engine.precision import BAND, SCALE, WINDOW, drift, losses, tiny
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


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_bf16_stays_by_float32(method, scenes_root, tmp_path):
    """One window of the 200 steps of ``python -m tests.engine.precision``."""
    exact, half = (losses(tiny(scenes_root, tmp_path, method, amp), WINDOW) for amp in ("off", "bf16"))
    assert not torch.equal(exact, half) and drift(exact, half) <= BAND


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_fp16_starts_as_float32_does(method, scenes_root, tmp_path):
    """Few steps, for lack of fp16 convolutions on a CPU."""
    a, half = (
        losses(tiny(scenes_root, tmp_path, method, "off"), 3),
        tiny(scenes_root, tmp_path, method, "fp16"),
    )
    b = losses(half, 3)
    assert not torch.equal(a, b) and half.scaler.get_scale() == SCALE
    torch.testing.assert_close(b, a, rtol=0.01, atol=0.01)


def test_drift_is_that_of_the_worst_window():
    exact = torch.ones(150)
    half = torch.cat([torch.full((50,), 1.02), torch.full((50,), 0.95), torch.full((50,), 9.0)])
    assert drift(exact[:120], half[:120]) == pytest.approx(0.05)
    assert drift(exact, half) == pytest.approx(8)
    assert drift(2 * exact, 2 * half) == pytest.approx(8)
    assert drift(0.1 * exact, 0.1 * half) == pytest.approx(0.8)


DELICATE = {
    "aten::_log_softmax", "aten::_softmax", "aten::logsumexp", "aten::log", "aten::log1p", "aten::exp",
    "aten::log_sigmoid_forward", "aten::binary_cross_entropy_with_logits", "aten::nll_loss2d_forward",
    "aten::nll_loss_forward", "aten::var", "aten::std", "aten::rsqrt", "aten::linalg_vector_norm",
}  # fmt: skip
"""What loses too much in half precision: logarithms, exponentials, variances and norms."""


class InHalf(TorchDispatchMode):
    """Collects the delicate ops that get a half-precision tensor."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func._schema.name in DELICATE and any(x.dtype in HALF for x in tensors):
            self.found.add(func._schema.name)
        return func(*args, **(kwargs or {}))


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_are_float32_and_so_is_what_they_are_made_of(method, scenes_root, tmp_path):
    run = tiny(scenes_root, tmp_path, method, "bf16")
    run.method.train()
    for step in (0, 30):
        with InHalf() as half:
            phases = list(run._phases(next(run.loader)))
        run.state.step = 30  # by then every term is there
        assert all(loss.dtype == torch.float32 for phase in phases for loss in phase.losses.values()), step
        assert not half.found, half.found


def test_delicate_ops_in_half_precision_are_found():
    with InHalf() as half:
        torch.ones(3, dtype=torch.bfloat16).log_softmax(0)
    assert half.found == {"aten::_log_softmax"}


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
    return ["--method", f"steep:{method}", "--data-root", root, "--out", out, "--quiet", "--amp=force-fp16",
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
    assert done.returncode == 0, done.stderr
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
