"""The step itself: what may not wait on the hot path, and the options that make it faster."""

import functools
import sys
import traceback
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastuda.config import OptimConfig, resolve
from fastuda.distributed import World
from fastuda.errors import UserError
from fastuda.methods import METHODS
from fastuda.optim import build_optimizer
from fastuda.trainer import Trainer

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
"""What makes the host wait for a device: numbers read, and shapes that depend on values."""

KNOWN = {
    "self_training": {("ema.py", "aten::_local_scalar_dense"): 1},  # the teacher's count of updates
    "sepico": {("ema.py", "aten::_local_scalar_dense"): 1},
    "weakseg": {("weakseg.py", "aten::nonzero"): 2},  # discriminators of the classes that are present alone
}
"""Waits that a step of a method has, by file and op, and how often; any other fails the test."""


class Waits(TorchDispatchMode):
    """Counts the calls of the ops in ``WAITS`` by the file of fastuda they come from, but for the reference
    implementations, which wait where they please."""

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if func._schema.name in WAITS:
            frames = [Path(f.filename) for f in traceback.extract_stack() if "fastuda" in f.filename]
            if not frames[-1].name.startswith("reference"):
                self.found[frames[-1].name, func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def trainer(root, out, *settings):
    plain = {"data.data_root": str(root), "data.crop": [32, 64], "data.batch_size": 2, "data.workers": 0}
    plain |= {"log.tensorboard": False, "train.device": "cpu", "train.steps": 4, "train.baseline": "off"}
    return Trainer(resolve(None, plain | dict(settings), {}), Path(out), World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_hot_path_does_not_wait(method, scenes_root, tmp_path):
    every_term = [("method.contrast_start", 0)] if method == "sepico" else []
    run = trainer(scenes_root, tmp_path, ("method.name", method), *every_term)
    run.guard.eager = False  # as on a GPU: losses are judged when they are logged
    run._train_step()
    batch = next(run.loader)
    with Waits() as waits:
        run._backward(batch)
    assert waits.found == KNOWN.get(method, {})


def test_apex_takes_the_place_of_torchs_optimiser(monkeypatch):
    """A stand-in for apex, which needs CUDA to be built."""

    class FusedSGD(torch.optim.SGD):
        pass

    class FusedAdam(torch.optim.Adam):
        def __init__(self, params, lr, betas, weight_decay, adam_w_mode=True):
            super().__init__(params, lr, betas, weight_decay=weight_decay)
            self.adam_w_mode = adam_w_mode

    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedAdam = FusedSGD, FusedAdam
    package = types.ModuleType("apex")
    package.optimizers = optimizers
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    net = torch.nn.Linear(3, 2)
    found = build_optimizer(OptimConfig(name="sgd", impl="apex", lr=0.1, momentum=0.5), net)
    assert type(found) is FusedSGD and found.param_groups[0]["momentum"] == 0.5
    assert found.param_groups[0]["initial_lr"] == 0.1
    for name in ("adam", "adamw"):
        found = build_optimizer(OptimConfig(name=name, impl="apex"), net)
        assert type(found) is FusedAdam and found.adam_w_mode == (name == "adamw")
    del optimizers.FusedSGD
    with pytest.raises(UserError, match="needs NVIDIA apex built with its CUDA extensions"):
        build_optimizer(OptimConfig(impl="apex"), net)


def test_steps_beyond_the_schedule_are_said(scenes_root, tmp_path, caplog):
    trainer(scenes_root, tmp_path, ("optim.horizon", 4))
    assert not caplog.records
    trainer(scenes_root, tmp_path, ("optim.horizon", 3))
    assert "the learning rate is 0 from there to train.steps=4" in caplog.text


def test_torchs_optimiser_is_fused():
    found = build_optimizer(OptimConfig(), torch.nn.Linear(3, 2))
    assert found.param_groups[0]["fused"] is True


def test_channels_last_is_a_matter_of_memory_alone(scenes_root, tmp_path):
    features, losses = [], []
    for choice in (True, False):
        run = trainer(scenes_root, tmp_path, ("train.channels_last", choice))
        features.append(run.method.model(torch.ones(2, 3, 32, 64)).features)
        run._train_step()
        losses.append(run._take_means()["train/loss"])
    assert features[0].is_contiguous(memory_format=torch.channels_last) and not features[0].is_contiguous()
    assert features[1].is_contiguous()
    torch.testing.assert_close(*features, rtol=1e-3, atol=5e-3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_compiled_segmentor_trains_and_scores_as_itself(scenes_root, tmp_path, monkeypatch):
    """The losses of three steps, the evaluation, and the names in the checkpoint; Inductor, which would take
    half a minute more, is left out."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    values = []
    for choice in (False, True):
        run = trainer(
            scenes_root,
            tmp_path / str(choice),
            ("train.compile", choice),
            ("train.steps", 3),
            ("log.every", 1),
        )
        (tmp_path / str(choice)).mkdir()
        calls = torch._dynamo.utils.counters["frames"]["ok"]
        scores = run.fit()
        compiled = torch._dynamo.utils.counters["frames"]["ok"] - calls
        assert (compiled > 0) == choice
        logged = (tmp_path / str(choice) / "metrics.csv").read_text().splitlines()
        losses = [float(row.split(",")[2]) for row in logged if ",train/loss," in row]
        state = torch.load(tmp_path / str(choice) / "checkpoints" / "last.pt", weights_only=True)
        values.append((losses, scores.miou, list(state["method"])))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-3) and len(values[0][0]) == 3
    assert values[0][1] == pytest.approx(values[1][1], abs=2.0)
    assert values[0][2] == values[1][2]
