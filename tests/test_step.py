"""The step itself: what may not wait on the hot path, and the options that make it faster."""

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
    "weakseg": {("weakseg.py", "aten::nonzero"): 3},  # discriminators of the classes that are present alone
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
    run = trainer(scenes_root, tmp_path, ("method.name", method))
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


def test_torchs_optimiser_is_fused():
    found = build_optimizer(OptimConfig(), torch.nn.Linear(3, 2))
    assert found.param_groups[0]["fused"] is True
