"""Where the time of a training step goes, by torch's profiler: the forward's parts by scopes put around them,
the backward's by the forward that each of its nodes came from."""

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
from fastuda.engine.trainer import Trainer
from fastuda.models.segmentor import Segmentor
from fastuda.system.files import written

PREFIX = "fastuda."
STEP = f"{PREFIX}step"
PARTS = ("data", "backbone", "heads", "ops", "optimiser", "rest")
"""Waiting for the batch; backbones, a teacher's too; segmentation heads, projections and discriminators;
fastuda.ops; the optimisers; and what is in none of them: augmentation, averages, guards, copies."""


@dataclass
class StepProfile:
    """One training step of one method."""

    method: str
    seconds: float
    """Median wall time of a step, measured without the profiler."""
    share: dict[str, float]
    """Of the step's time, by part; they add up to 1."""
    ops: dict[str, float] = field(default_factory=dict)
    """Of the step's time, by op, forward and backward."""
    launches: float = 0.0
    """Kernels, copies and graphs that the host starts on a GPU in a step; 0 on a CPU."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


class _Watched:
    """A loader whose batches are waited for in a scope."""

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
                _hook(stack, module.head, "heads")
        for other in dict.fromkeys(_others(trainer.method)):
            _hook(stack, other, "heads")
        for name in F.__all__:
            op = getattr(F, name)
            if callable(op) and not isinstance(op, type) and name != "backends":
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


def profile_step(
    trainer: Trainer, *, warm_up: int = 2, steps: int = 5, trace: Path | None = None
) -> StepProfile:
    """Time ``steps`` steps, then profile as many, of a trainer whose run has not begun.

    On a GPU the time of a part is that of its kernels, and what they leave of the step is ``rest``.

    Args:
        trainer: of the method; its weights move on by all these steps.
        warm_up: steps before.
        steps: of each kind.
        trace: where to leave a Chrome trace (chrome://tracing, Perfetto).

    Raises:
        UserError: the trace cannot be written.
    """
    cuda = trainer.world.device.type == "cuda"
    trainer.method.train()
    for _ in range(warm_up):
        trainer._train_step()
    seconds = [_seconds(trainer, cuda) for _ in range(steps)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _scopes(trainer), _quiet(), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                trainer._train_step()
                if cuda:
                    torch.cuda.synchronize()
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder, written(trace) as place:
            # torch only logs what it cannot write, and renames its file over a device
            made = Path(folder) / trace.name
            profiler.export_chrome_trace(str(made))
            place.write_bytes(made.read_bytes())
    events = list(profiler.events() or [])
    total, found = _times(events, cuda)
    share = {part: found[part] / total for part in PARTS[:-1]}
    share["rest"] = max(0.0, 1 - sum(share.values()))
    prefix = "ops."
    ops = {key.removeprefix(prefix): found[key] / total for key in sorted(found) if key.startswith(prefix)}
    return StepProfile(str(trainer.config.method["name"]), statistics.median(seconds), share, ops,
                       count_launches(events) / steps)  # fmt: skip


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")
"""What the names of the calls begin with that start work on a GPU."""


def count_launches(events: Iterable[Any]) -> int:
    """How often the host has started work on a GPU."""
    return sum(event.name.startswith(LAUNCHES) for event in events if event.device_type == DeviceType.CPU)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's lines about the start and the end of a profile, which no setting of it turns off."""
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
    trainer._train_step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _times(events: Iterable[Any], cuda: bool) -> tuple[float, Counter[str]]:
    """Microseconds of all steps, and by part and by op in them."""
    # a GPU's own events repeat the scopes, with the gaps between their kernels
    events = [event for event in events if event.device_type == DeviceType.CPU]
    roots = sorted((e for e in events if e.cpu_parent is None), key=lambda e: e.time_range.start)
    origin: dict[int, str] = {}
    # of the events with one number the last is the one that made the node: others only read the counter
    for event, part in _walk(roots, _scope):
        if event.sequence_nr >= 0 and not event.fwd_thread:
            origin[event.sequence_nr] = part or ""

    def classify(event: Any) -> str | None:
        if event.fwd_thread:
            return origin.get(event.sequence_nr, "")
        return _scope(event)

    found: Counter[str] = Counter()
    for event, part in _walk(roots, classify, descend=False):
        if part:
            spent = event.device_time_total if cuda and part != "data" else event.time_range.elapsed_us()
            found[part.partition(".")[0]] += spent
            if "." in part:
                found[part] += spent
    return sum(e.time_range.elapsed_us() for e in events if e.name == STEP), found


def _scope(event: Any) -> str | None:
    """The part that an event's own name tells."""
    if event.name.startswith("Optimizer."):
        return "optimiser"
    if event.name.startswith(PREFIX) and event.name != STEP:
        return event.name.removeprefix(PREFIX)
    return None


def _walk(
    roots: list[Any], classify: Callable[[Any], str | None], descend: bool = True
) -> Iterator[tuple[Any, str | None]]:
    """Events in the order of their begin, each with the outermost part around it; those below a part only
    where ``descend``."""
    stack: list[tuple[Any, str | None]] = [(event, None) for event in reversed(roots)]
    while stack:
        event, part = stack.pop()
        part = part if part is not None else classify(event)
        yield event, part
        if descend or part is None:
            below = sorted(event.cpu_children, key=lambda e: e.time_range.start, reverse=True)
            stack += [(child, part) for child in below]


def table(profiles: list[StepProfile]) -> str:
    """Markdown: a row per method; the launches where a GPU was profiled."""
    on_gpu = any(found.launches for found in profiles)
    more = ["launches"] if on_gpu else []
    lines = ["| " + " | ".join(["method", "step", *PARTS, *more, "largest ops"]) + " |"]
    lines.append("|---" * (len(PARTS) + len(more) + 3) + "|")
    for found in profiles:
        largest = sorted(found.ops.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"`{name}` {100 * share:.0f}%" for name, share in largest)
        shares = " | ".join(f"{100 * found.share[part]:.1f}%" for part in PARTS)
        shares += f" | {found.launches:.0f}" if on_gpu else ""
        lines.append(f"| `{found.method}` | {1e3 * found.seconds:.0f} ms | {shares} | {said} |")
    return "\n".join(lines)
