"""The cost of an option: steps of a method with it and without it, by turns in one process.

On a noisy machine, ratios of times measured side by side are reliable, but ratios of two processes are not.
On a CPU the ratio is of processor time.
"""

from __future__ import annotations

import datetime
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.jobs import Failed, side, trainer
from bench.machine import commit, machine
from fastuda.engine.trainer import Trainer
from fastuda.system.memory import keep_freed_memory

COLUMNS = (
    *("method", "settings", "beside", "backbone", "crop", "batch", "dtype", "seconds", "beside_s", "ratio"),
    *("mib", "beside_mib", "machine", "torch", "commit", "date"),
)

SETTINGS = ("settings", "beside")


def seconds(run: Trainer, device: str) -> float:
    """Seconds of one step: processor time on a CPU, wall time on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    run.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def allocated(run: Trainer, device: str) -> float:
    """Peak MiB of torch's allocator during a step, above its MiB after the step. The memory of the process
    would differ by some percent, because freed blocks leave gaps."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run.step()
        return (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return (highest - held) / 2**20


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Least seconds of a step, and its peak memory in MiB above what remains between steps; first for the
    job's settings, then for those in ``job["beside"]``."""
    device = job["device"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [job, {**job, "settings": {**job["settings"], **job["beside"]}}]
        runs = [trainer(one, Path(folder) / str(i)) for i, one in enumerate(jobs)]
        for run in runs:
            run.method.train()
            run.step()  # the first step includes compilation and caches
        memory = [allocated(run, device) for run in runs]
        if device == "cpu":
            keep_freed_memory()
        times: list[list[float]] = [[], []]
        for k in range(job["steps"] + 1):
            for i in (0, 1) if k % 2 else (1, 0):
                times[i].append(seconds(runs[i], device))
        for run in runs:
            run.loader.close()
    return {"seconds": [min(of[1:]) for of in times], "mib": memory}


def cost(job: dict, timeout: float = math.inf) -> dict[str, object]:
    """Measure the job's settings against those of ``--beside``, as one row.

    Raises:
        Failed: there is no measurement.
    """
    result = side(job, "fused", timeout)
    if "failed" in result:
        raise Failed(f"{job['method']}, {result['failed']}")
    return row_of(job, result)


def row_of(job: dict[str, Any], result: dict[str, Any]) -> dict[str, object]:
    """The row of a measurement."""
    (own, other), (mib, other_mib) = result["seconds"], result["mib"]
    threads = "" if job["device"] == "cuda" else f" x{job['threads'] or torch.get_num_threads()}"
    settings, beside = (" ".join(f"{k}={json.dumps(v)}" for k, v in job[key].items()) for key in SETTINGS)
    return {
        "method": job["method"], "settings": settings, "beside": beside, "backbone": job["backbone"],
        "crop": "x".join(map(str, job["crop"])), "batch": job["batch"], "dtype": job["dtype"],
        "seconds": f"{own:.4g}", "beside_s": f"{other:.4g}", "ratio": f"{own / other:.2f}",
        "mib": f"{mib:.0f}", "beside_mib": f"{other_mib:.0f}",
        "machine": f"{machine(job['device'])}{threads}", "torch": torch.__version__,
        "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def line_of(row: dict[str, object]) -> str:
    """A row as one line of text."""
    return (
        f"{row['method']} {row['settings']}: {row['ratio']} times a step with {row['beside']}"
        f" ({row['seconds']} s against {row['beside_s']} s), {row['mib']} MiB against {row['beside_mib']} MiB"
    )
