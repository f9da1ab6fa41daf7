"""The cost of an option: steps of a method with it and without it, by turns in one process.

Ratios of times taken side by side hold on a noisy machine, where times of two processes do not. On a CPU they
are of processor time.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, machine
from bench.measure import peak, start_peak
from fastuda.engine.trainer import Trainer
from fastuda.system.memory import keep_freed_memory

COLUMNS = (
    *("method", "settings", "beside", "backbone", "crop", "batch", "dtype", "seconds", "beside_s", "ratio"),
    *("mib", "beside_mib", "machine", "torch", "commit", "date"),
)


def seconds(run: Trainer, device: str) -> float:
    """Of one step: of the processor on a CPU, of the clock on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    run.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def measure(job: dict[str, Any], trainer: Callable[[dict[str, Any], Path], Trainer]) -> dict[str, Any]:
    """Least seconds of a step, and its peak memory above what stays between steps in MiB; of the job's
    settings first, then of those in ``job["beside"]`` in their place."""
    device = job["device"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [job, {**job, "settings": {**job["settings"], **job["beside"]}}]
        runs = [trainer(one, Path(folder) / str(i)) for i, one in enumerate(jobs)]
        memory = []
        for run in runs:
            run.method.train()
            run.step()  # the first step includes compilation and caches
        for run in runs:
            before = start_peak(device)
            run.step()
            memory.append(peak(device) - before)
        if device == "cpu":
            keep_freed_memory()
        times: list[list[float]] = [[], []]
        for k in range(job["steps"] + 1):
            for i in (0, 1) if k % 2 else (1, 0):
                times[i].append(seconds(runs[i], device))
        for run in runs:
            run.loader.close()
    return {"seconds": [min(of[1:]) for of in times], "mib": memory}


def row_of(job: dict[str, Any], result: dict[str, Any]) -> dict[str, object]:
    """The row of a measurement."""
    (own, other), (mib, other_mib) = result["seconds"], result["mib"]
    threads = "" if job["device"] == "cuda" else f" x{job['threads'] or torch.get_num_threads()}"
    shown = (" ".join(f"{k}={json.dumps(v)}" for k, v in job[key].items()) for key in ("settings", "beside"))
    values = (
        *(
            job["method"],
            *shown,
            job["backbone"],
            "x".join(map(str, job["crop"])),
            job["batch"],
            job["dtype"],
        ),
        *(f"{own:.3f}", f"{other:.3f}", f"{own / other:.2f}", f"{mib:.0f}", f"{other_mib:.0f}"),
        *(f"{machine(job['device'])}{threads}", torch.__version__, commit()),
        datetime.date.today().isoformat(),
    )
    return dict(zip(COLUMNS, values, strict=True))


def line_of(row: dict[str, object]) -> str:
    """A row as one line of text."""
    return (
        f"{row['method']} {row['settings']}: {row['ratio']} times a step with {row['beside']}"
        f" ({row['seconds']} s against {row['beside_s']} s), {row['mib']} MiB against {row['beside_mib']} MiB"
    )
