"""Seconds of a training step on each side of bench.end_to_end, measured by turns in one process.

The speed of a shared machine differs by 10 percent between two processes. Steps that take turns meet the same
machine.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import published
from bench.jobs import trainer
from fastuda.system.memory import keep_freed_memory

Change = tuple[Any, str, Any]
"""An attribute to replace: of what, its name, its value."""


def changes(name: str) -> list[Change]:
    """What the side ``name`` replaces in this process."""
    listed: list[Change] = []
    published.SIDES[name](lambda *change: listed.append(change))
    return listed


def seconds(job: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Seconds of ``job["steps"]`` steps of every side in ``job["sides"]``, after one untimed step of each."""
    run = trainer(job, folder)
    run.method.train()
    sides = {name: changes(name) for name in job["sides"]}
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(job["steps"] + 1):
        for name in order:
            with ExitStack() as stack:
                for change in sides[name]:
                    stack.enter_context(patch.object(*change))
                began = time.perf_counter()
                run.step()
                if job["device"] == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
        order.reverse()
        if turn == 0 and job["device"] == "cpu":
            keep_freed_memory()  # as the trainer does after its first step
    run.loader.close()
    return {name: of[1:] for name, of in times.items()}
