"""Running the command lines as a user does, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from fastuda.__main__ import module as command_module
from fastuda.cli import run

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    "--crop",
    "32",
    "64",
    "--batch-size",
    "2",
    "--workers",
    "0",
    "train.baseline=off",
    "log.tensorboard=false",
    "log.report=false",
)


def fastuda(module: str, *args: object, **kwargs):
    """``python -m fastuda.<module> args`` in this process, on one thread; its output captured as text."""
    if kwargs:
        return in_a_process(module, *args, **kwargs)
    out, err = io.StringIO(), io.StringIO()
    argv, threads = sys.argv, torch.get_num_threads()
    sys.argv = [module, *map(str, args)]
    torch.set_num_threads(1)
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(importlib.import_module(command_module(module)).main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        logging.getLogger("fastuda").handlers.clear()
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def in_a_process(
    module: str, *args: object, cwd: Path | None = None, env: dict | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    return subprocess.run(
        command(module, *args),
        cwd=cwd or ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def command(module: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"fastuda.{module}", *map(str, args)]


def environment(extra: dict | None = None) -> dict:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(extra or {})}


def untrained_run(folder: Path, method: str = "source_only", **settings: object) -> Path:
    """A folder with what predicting needs and nothing else; the network has its initial weights."""
    from fastuda.config.resolve import resolve
    from fastuda.data.labels import CITYSCAPES
    from fastuda.inference.saved import save_model
    from fastuda.models import build_model

    config = resolve(None, {"method.name": method, **settings}, {})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    torch.manual_seed(0)
    save_model(folder / "model.safetensors", build_model(config.model, len(CITYSCAPES)), CITYSCAPES)
    return folder


def curves(run: Path) -> list[tuple[int, str, str]]:
    """Rows of metrics.csv that do not measure time."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "name", "value"]
    return [(int(step), name, value) for step, name, value in rows[1:] if not name.startswith("perf/")]


def state(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def equal(a: object, b: object) -> bool:
    """Nested equality, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def without_clocks(checkpoint: dict) -> dict:
    """A checkpoint less what a clock put into it."""
    out = {key: value for key, value in checkpoint.items() if key != "curves"}  # bytes, of clocks too
    out["ranks"] = [
        {**rank, "means": {k: v for k, v in rank["means"]["sums"].items() if not k.startswith("perf/")}}
        for rank in checkpoint["ranks"]
    ]
    return out
