"""Measures the parts of a training step with torch's profiler: scopes mark the parts of the forward, and
each backward node is assigned to the forward that created it."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import fastuda.ops as F
from fastuda.data.loading.torch_loader import workers_alive
from fastuda.engine.trainer import Trainer
from fastuda.models.segmentor import Segmentor
from fastuda.system.files import written

PREFIX = "fastuda."
LAYERS = ("aspp", "batch_norm_act", "depthwise_conv2d")
"""Ops that count as what they are a part of: heads and backbones."""
STEP = f"{PREFIX}step"
PARTS = ("data", "backbone", "heads", "ops", "optimiser", "rest")
"""Waiting for the batch; backbones (also a teacher's); segmentation heads, projections and discriminators;
fastuda.ops; the optimisers; and everything else: augmentation, averages, guards, copies."""


@dataclass
class StepProfile:
    """One training step of one method."""

    method: str
    seconds: float
    """Median wall time of a step, measured without the profiler."""
    share: dict[str, float]
    """Part to its share of the step's time; the shares add up to 1."""
    ops: dict[str, float] = field(default_factory=dict)
    """Op to its share of the step's time, forward and backward."""
    launches: float = 0.0
    """Kernels, copies and graphs that the host starts on a GPU in a step; 0 on a CPU."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


class _Watched:
    """A loader that waits for each batch in a profiler scope."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __next__(self) -> Any:
        with record_function(f"{PREFIX}data"):
            return next(self.loader)


@contextmanager
def _scopes(trainer: Trainer) -> Iterator[None]:
    """Scopes around the loader, the networks' parts and the ops."""
    with ExitStack() as stack:
        loader = trainer.loader
        trainer.loader = _Watched(loader)  # type: ignore[assignment]
        stack.callback(setattr, trainer, "loader", loader)
        for module in trainer.method.modules():
            if isinstance(module, Segmentor):
                _hook(stack, module.backbone, "backbone")
                for name, part in module.named_children():
                    if name != "backbone":
                        _hook(stack, part, "heads")
        for other in dict.fromkeys(_others(trainer.method)):
            _hook(stack, other, "heads")
        for name in F.__all__:
            op = getattr(F, name)
            if callable(op) and not isinstance(op, type) and name not in ("backends", *LAYERS):
                setattr(F, name, _scoped(op, name))
                stack.callback(setattr, F, name, op)
        yield


def _others(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below ``module`` that are called as a whole and belong to no segmentor."""
    for child in module.children():
        if isinstance(child, Segmentor):
            continue
        holds = any(isinstance(m, Segmentor) for m in child.modules())
        if holds or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _others(child)
        else:
            yield child


def _hook(stack: ExitStack, module: nn.Module, part: str) -> None:
    """A scope around every forward of ``module``."""
    open_scopes: list[Any] = []

    def enter(*_: Any) -> None:
        scope = record_function(f"{PREFIX}{part}")
        scope.__enter__()
        open_scopes.append(scope)

    def leave(*_: Any) -> None:
        open_scopes.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _scoped(op: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(op)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{PREFIX}ops.{name}"):
            return op(*args, **kwargs)

    return scoped


@workers_alive()
def profile_step(
    trainer: Trainer, *, warm_up: int = 2, steps: int = 5, trace: Path | None = None
) -> StepProfile:
    """Time ``steps`` steps without the profiler, then profile as many, of a trainer whose run has not begun.

    On a GPU the time of a part is the time of its kernels; the rest of the step counts as ``rest``.

    Args:
        trainer: trains the method; all these steps change its weights.
        warm_up: steps before the timed ones.
        steps: number of steps, with and without the profiler.
        trace: file for a Chrome trace (chrome://tracing, Perfetto).

    Raises:
        UserError: the trace cannot be written, or a loader process died.
    """
    cuda = trainer.world.device.type == "cuda"
    trainer.method.train()
    for _ in range(warm_up):
        trainer.step()
    seconds = [_seconds(trainer, cuda) for _ in range(steps)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _scopes(trainer), _quiet(), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                trainer.step()
                if cuda:
                    torch.cuda.synchronize()
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder, written(trace) as place:
            # torch only logs a failed write, and would replace a device by a file
            made = Path(folder) / trace.name
            profiler.export_chrome_trace(str(made))
            place.write_bytes(made.read_bytes())
    events = list(profiler.events() or [])
    total, microseconds = _times(events, cuda)
    share = {part: microseconds[part] / total for part in PARTS[:-1]}
    share["rest"] = max(0.0, 1 - sum(share.values()))
    prefix = "ops."
    ops = {
        key.removeprefix(prefix): microseconds[key] / total
        for key in sorted(microseconds)
        if key.startswith(prefix)
    }
    return StepProfile(
        str(trainer.config.method["name"]),
        statistics.median(seconds),
        share,
        ops,
        count_launches(events) / steps,
    )


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")
"""Beginnings of the names of the calls that start work on a GPU."""


def count_launches(events: Iterable[Any]) -> int:
    """The number of times that the host started work on a GPU."""
    return sum(event.name.startswith(LAUNCHES) for event in events if event.device_type == DeviceType.CPU)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's messages about the start and end of a profile, which no setting turns off."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _seconds(trainer: Trainer, cuda: bool) -> float:
    began = time.perf_counter()
    trainer.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _times(events: Iterable[Any], cuda: bool) -> tuple[float, Counter[str]]:
    """Microseconds of all steps, and of each part and op."""
    # GPU events repeat the scopes, including the gaps between kernels
    events = [event for event in events if event.device_type == DeviceType.CPU]
    roots = sorted((e for e in events if e.cpu_parent is None), key=lambda e: e.time_range.start)
    origin: dict[int, str] = {}
    # of the events with the same number, the last one created the node; the others only read the counter
    for event, part in _walk(roots, _scope):
        if event.sequence_nr >= 0 and not event.fwd_thread:
            origin[event.sequence_nr] = part or ""

    def classify(event: Any) -> str | None:
        if event.fwd_thread:
            return origin.get(event.sequence_nr, "")
        return _scope(event)

    microseconds: Counter[str] = Counter()
    for event, part in _walk(roots, classify, descend=False):
        if part:
            spent = event.device_time_total if cuda and part != "data" else event.time_range.elapsed_us()
            microseconds[part.partition(".")[0]] += spent
            if "." in part:
                microseconds[part] += spent
    return sum(e.time_range.elapsed_us() for e in events if e.name == STEP), microseconds


def _scope(event: Any) -> str | None:
    """The part that an event's name stands for."""
    if event.name.startswith("Optimizer."):
        return "optimiser"
    if event.name.startswith(PREFIX) and event.name != STEP:
        return event.name.removeprefix(PREFIX)
    return None


def _walk(
    roots: list[Any], classify: Callable[[Any], str | None], descend: bool = True
) -> Iterator[tuple[Any, str | None]]:
    """Events by start time, each with the outermost part around it. Events inside a part are included only
    if ``descend``."""
    stack: list[tuple[Any, str | None]] = [(event, None) for event in reversed(roots)]
    while stack:
        event, part = stack.pop()
        part = part if part is not None else classify(event)
        yield event, part
        if descend or part is None:
            below = sorted(event.cpu_children, key=lambda e: e.time_range.start, reverse=True)
            stack += [(child, part) for child in below]


def table(profiles: list[StepProfile]) -> str:
    """A Markdown table with a row per method; it has the launches if a GPU was profiled."""
    on_gpu = any(one.launches for one in profiles)
    more = ["launches"] if on_gpu else []
    lines = ["| " + " | ".join(["method", "step", *PARTS, *more, "largest ops"]) + " |"]
    lines.append("|---" * (len(PARTS) + len(more) + 3) + "|")
    for one in profiles:
        largest = sorted(one.ops.items(), key=lambda item: -item[1])[:3]
        largest_ops = ", ".join(f"`{name}` {100 * share:.0f}%" for name, share in largest)
        shares = " | ".join(f"{100 * one.share[part]:.1f}%" for part in PARTS)
        shares += f" | {one.launches:.0f}" if on_gpu else ""
        lines.append(f"| `{one.method}` | {1e3 * one.seconds:.0f} ms | {shares} | {largest_ops} |")
    return "\n".join(lines)
