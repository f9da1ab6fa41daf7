"""The step itself: what may not wait on the hot path, and the options that make it faster."""

import contextlib
import dataclasses
import functools
import io
import sys
import traceback
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fastuda
from fastuda.config.schema import OptimConfig
from fastuda.data.config import DataConfig
from fastuda.data.loading.augment import jitter_source
from fastuda.engine.optim import build_optimizer
from fastuda.errors import UserError
from fastuda.methods import METHODS, get_method
from fastuda.models import ModelConfig, build_model
from fastuda.ops import _backends
from fastuda.system.settings import build
from tests.engine.ddp_worker import CLASSES, joint_batch
from tests.engine.runs import trainer

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
PACKAGE = Path(fastuda.__file__).parent


def waits(op, args):
    """Whether an op makes the host wait for a device: numbers are read, a shape depends on values, or a list
    is made a tensor, which is then copied to the device."""
    if op in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return op in WAITS or (op == "aten::lift_fresh" and args[0].dim() > 0)


class Waits(TorchDispatchMode):
    """Counts the calls that wait by the file of fastuda they come from, but for those of the reference
    implementations, which wait where they please, of the loader, and of the ops' checks of values, which look
    at CPU tensors alone (tests/gpu has them on a GPU)."""

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        op = func._schema.name
        if waits(op, args):
            files = [Path(f.f_code.co_filename) for f, _ in traceback.walk_stack(None)]
            ours = [file.relative_to(PACKAGE) for file in files if file.is_relative_to(PACKAGE)]
            last = ours[0].name
            spared = last.startswith("reference") or last == "_checks.py"
            loading = any(file.parts[0] == "data" and file.name != "augment.py" for file in ours)
            if not (spared or loading):
                self.found[last, op] += 1
        return func(*args, **(kwargs or {}))


HOT = [
    *((method, "off") for method in (*sorted(METHODS), "plca+self_training")),
    ("source_only", "force-fp16"),
]


@pytest.mark.parametrize(("method", "amp"), HOT)
def test_the_hot_path_does_not_wait(method, amp, scenes_root, tmp_path):
    settings = [("train.amp", amp), ("optim.clip_norm", 1.0), ("data.jitter", 0.5), ("data.jitter_hue", 0.2)]
    settings += [("method.contrast_start", 0)] if method == "sepico" else []
    run = trainer(scenes_root, tmp_path, ("method.name", method), *settings)
    run.guard.eager = False  # as on a GPU: losses are judged when they are logged
    run.step()
    with Waits() as found:
        run.step()
    assert not found.found


VARIANTS = [
    ("weakseg", {"weak_labels": "tags", "category_width": 8}),
    ("weakseg", {"weak_labels": "points", "category_width": 8}),
    ("asanet", {"strategy": "asc"}),
    ("fada", {"hard_threshold": 0.3}),
    ("plca", {"pixel_share": 0.5, "lovasz_weight": 0.0}),
    ("self_training", {"static_classes": [0, 2], "class_frequencies": [0.4, 0.3, 0.1, 0.1, 0.1]}),
    *(
        ("sepico", {"static_classes": [0], "variant": variant, "width": 8, "contrast_start": 0, **crop})
        for variant in ("dist", "bank", "proto")
        for crop in ({}, {"balanced_crop": [32, 64], "ignore_bottom": 4})
    ),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_no_variant_waits(name, settings):
    """With weak labels and matched images."""
    torch.manual_seed(0)
    method_class = get_method(name)
    model = build_model(ModelConfig(backbone="small"), CLASSES)
    method = method_class(build(method_class.Config, settings, "method"), model, CLASSES).double().train()
    data = joint_batch(0, False)
    data = dataclasses.replace(data, target_match=data.target_image.flip(0))
    for step in range(2):
        with Waits() as found:
            for phase in method.phases(data, step):
                sum(phase.losses.values()).backward()
            method.after_step(step)
    assert not found.found


PLAIN = [(name, {"contrast_start": 0} if name == "sepico" else {}) for name in sorted(METHODS)]


def steps_on_meta(name, settings, backbone="small"):
    """Two steps of forward, backward and what follows, on the meta device, which no tensor of the CPU goes
    together with and which has no values to ask for."""
    method_class = get_method(name)
    model = build_model(ModelConfig(backbone=backbone), CLASSES)
    method = method_class(build(method_class.Config, settings, "method"), model, CLASSES)
    method = method.double().to("meta").train()
    data = joint_batch(0, False)
    if "static_classes" in settings:
        data = dataclasses.replace(data, target_match=data.target_image.flip(0))
    data = data.to(torch.device("meta"))
    data = jitter_source(data, DataConfig(jitter=0.5, jitter_hue=0.2), model.input)
    for step in range(2):
        for phase in method.phases(data, step):
            torch.stack(list(phase.losses.values())).sum().backward()
            assert all(value.is_meta for value in phase.metrics.values() if isinstance(value, torch.Tensor))
        method.after_step(step)
    nets = method.networks().values()
    assert all(p.grad.is_meta for net in nets for p in net.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in method.model.parameters())


@pytest.mark.parametrize(("name", "settings"), [*PLAIN, *VARIANTS])
def test_a_step_stays_on_the_device_of_its_batch(name, settings, monkeypatch):
    """The ops are Triton's, known by their shapes there."""
    monkeypatch.setattr(_backends, "select", lambda op, *tensors, backend: "triton")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta
    steps_on_meta(name, settings)


def test_a_plca_step_stays_there_with_all_kinds_of_kernels(monkeypatch):
    """Each op by the implementation that a GPU has first: products by the library, CUDA C++, Triton."""
    chosen = {}

    def first(op, *tensors, backend):
        rows = [row for row in _backends.BACKENDS[op] if row.device == "cuda"]
        chosen[op] = next(row.name for row in rows if not (row.limit and row.limit(*tensors)))
        return chosen[op]

    monkeypatch.setattr(_backends, "select", first)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    steps_on_meta("plca", {}, "resnet18")
    kinds = {"spatial_aggregate", "cycle_association_loss", "upsample_cross_entropy", "lovasz_softmax"}
    assert chosen.keys() >= kinds


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
        run.step()
        losses.append(run.take_means()["train/loss"])
    assert features[0].is_contiguous(memory_format=torch.channels_last) and not features[0].is_contiguous()
    assert features[1].is_contiguous()
    torch.testing.assert_close(*features, rtol=1e-3, atol=5e-3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_compiled_segmentor_trains_and_scores_as_itself(scenes_root, tmp_path, monkeypatch):
    """The losses of three steps, the evaluation, and the names in the checkpoint; Inductor, which would take
    half a minute more, is left out."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    shown = io.StringIO()
    monkeypatch.setattr("fastuda.engine.trainer.progress", lambda *args: tqdm(total=args[0], file=shown))
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
        assert (compiled > 0) == ("compiling" in shown.getvalue()) == choice
        logged = (tmp_path / str(choice) / "metrics.csv").read_text().splitlines()
        losses = [float(row.split(",")[2]) for row in logged if ",train/loss," in row]
        state = torch.load(tmp_path / str(choice) / "checkpoints" / "last.pt", weights_only=True)
        values.append((losses, scores.miou, list(state["method"])))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-3) and len(values[0][0]) == 3
    assert values[0][1] == pytest.approx(values[1][1], abs=2.0)
    assert values[0][2] == values[1][2]
