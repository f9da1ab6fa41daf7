"""The profile of a step finds what was made slow, in the forward and in the backward, wherever it is."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import fastuda.ops as F
from fastuda.engine.profiling import PARTS, StepProfile, count_launches, profile_step, table
from fastuda.methods import METHODS
from tests.engine.runs import refused, trainer
from tests.program import fastuda

NAP = 0.4


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(NAP)
        return grad


def slow_op(run, monkeypatch):
    op = F.upsample_cross_entropy
    monkeypatch.setattr(
        F, "upsample_cross_entropy", lambda x, *args, **kw: op(SlowBackward.apply(x), *args, **kw)
    )


def slow_backbone(run, monkeypatch):
    run.method.model.backbone.register_forward_hook(lambda module, args, out: SlowBackward.apply(out))


def slow_head(run, monkeypatch):
    forward = run.method.model.head.forward
    monkeypatch.setattr(run.method.model.head, "forward", lambda x: time.sleep(NAP) or forward(x))


def slow_data(run, monkeypatch):
    source = run.domains.sources[0]
    read = source.read_pair
    monkeypatch.setattr(type(source), "read_pair", lambda self, i: time.sleep(NAP / 2) or read(i))


def slow_optimiser(run, monkeypatch):
    group = torch.optim.SGD._init_group
    monkeypatch.setattr(torch.optim.SGD, "_init_group", lambda *a, **kw: time.sleep(NAP) or group(*a, **kw))


def slow_rest(run, monkeypatch):
    monkeypatch.setattr(run.method, "after_step", lambda step: time.sleep(NAP))


SLOW = {"ops": slow_op, "backbone": slow_backbone, "heads": slow_head, "data": slow_data,
        "optimiser": slow_optimiser, "rest": slow_rest}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_what_is_slow_is_found(part, scenes_root, tmp_path, monkeypatch):
    run = trainer(scenes_root, tmp_path, ("method.name", "source_only"), ("data.crop", [16, 32]))
    SLOW[part](run, monkeypatch)
    found = profile_step(run, warm_up=1, steps=2)
    assert max(found.share, key=found.share.get) == part, found
    assert sum(found.share.values()) == pytest.approx(1) and found.seconds > NAP
    if part == "ops":
        assert max(found.ops, key=found.ops.get) == "upsample_cross_entropy", found
    assert sum(found.ops.values()) == pytest.approx(found.share["ops"])


@pytest.mark.parametrize("method", [*sorted(METHODS), "plca+sepico"])
def test_little_is_left_of_a_step(method, scenes_root, tmp_path):
    """What no part accounts for is less than half of it, and profiling leaves nothing behind."""
    run = trainer(scenes_root, tmp_path, ("method.name", method))
    before = {name: getattr(F, name) for name in F.__all__}
    loader = run.loader
    found = profile_step(run, warm_up=1, steps=1)
    assert found.share["rest"] < 0.5 and found.share["backbone"] > 0.05, found
    assert run.loader is loader and all(getattr(F, name) is op for name, op in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.method.modules())


TINY = ["--crop", 32, 64, "--batch-size", 2, "--workers", 0, "--steps", 1, "--device", "cpu"]


def test_the_command_line(scenes_root, tmp_path):
    args = ["--data-root", scenes_root, *TINY]
    done = fastuda("profile", "--method", "source_only,plca", "--amp", *args)
    assert done.returncode == 0, done.stderr
    assert "| `source_only` |" in done.stdout and "| `plca` |" in done.stdout and "backbone" in done.stdout
    trace = tmp_path / "trace.json"
    done = fastuda("profile", "--method", "plca", "--json", "--trace", trace, *args)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["profiles"]
    assert found["method"] == "plca" and set(found["share"]) == set(PARTS)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"fastuda.step", "fastuda.backbone", "fastuda.ops.spatial_aggregate"} <= names


def test_what_cannot_be_profiled_is_said(scenes_root, tmp_path, monkeypatch):
    refused(fastuda("profile", "--method", "all", "--trace", "x.json"), "--trace takes a single --method")
    for place in ("/proc/x.json", tmp_path):
        args = ["--method", "plca", "--data-root", scenes_root, *TINY]
        done = fastuda("profile", *args, "--trace", place)
        refused(done, f"cannot write {place}")
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    refused(fastuda("profile", "--steps", 0), "--steps is 0")
    refused(fastuda("profile", "--method", "plac"), "did you mean plca")


def test_launches_are_those_that_the_host_makes():
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "aten::mm", "cudaGraphLaunch"]
    events = [SimpleNamespace(name=name, device_type=DeviceType.CPU) for name in names]
    events.append(SimpleNamespace(name="cudaLaunchKernel", device_type=DeviceType.CUDA))
    assert count_launches(events) == 4
    shares = dict.fromkeys(PARTS, 0.0)
    rows = [StepProfile("plca", 0.1, shares, {}, launches) for launches in (0.0, 412.0)]
    assert "launches" not in table(rows[:1])
    head, _, line = table(rows[1:]).splitlines()
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[[cell.strip() for cell in head.split("|")].index("launches")] == "412"
