"""The jobs of ``bench.end_to_end``: their configurations and processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor

from fastuda.config.resolve import resolve
from fastuda.config.schema import RunConfig
from fastuda.data.loading.batch import Batch
from fastuda.data.scenes import ScenesConfig, ensure_scenes
from fastuda.engine.trainer import Trainer
from fastuda.system import distributed

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "source_only": {"lovasz_weight": 0.0},
    "plca": {"lovasz_weight": 0.75, "association_weight": 0.1},
    "sepico": {"contrast_start": 0, "width": 512},
    "weakseg": {"category_width": None},
}
"""The published settings that the shipped configuration of the scenes changes, and SePiCo's contrast from the
first step."""


def trainer(job: dict, folder: Path) -> Trainer:
    """The trainer of one method on scenes of the crop's size, with the loader in the same process."""
    scenes = ScenesConfig(source=4, target=4, evaluation=1, height=job["crop"][0], width=job["crop"][1])
    root = Path(job.get("root") or folder)
    ensure_scenes(root / "scenes", scenes, quiet=True)
    return Trainer(config_of(job, root), folder / "run", distributed.start(job["device"]), quiet=True)


def config_of(job: dict, root: Path) -> RunConfig:
    """The configuration of a job.

    Raises:
        UserError: an unknown method, backbone or setting.
    """
    settings = {**SETTINGS.get(job["method"], {}), **job["settings"]}
    sections = {name: settings.pop(name) for name in ("data", "model") if name in settings}
    chosen = {
        "method.name": job["method"], "data.data_root": str(root), "data.crop": job["crop"],
        "data.batch_size": job["batch"], "data.workers": job.get("workers", 0), "data.loader": "torch",
        "data.check_labels": 1,
        "model.backbone": job["backbone"], "optim.lr": 1e-4, "optim.warmup": 0, "train.device": job["device"],
        "train.amp": "force-bf16" if job["dtype"] == "bfloat16" else "off", "log.tensorboard": False,
        "train.keep_memory": False,
    }  # fmt: skip
    return resolve(None, chosen | {f"method.{key}": value for key, value in settings.items()}, sections)


def watch_losses(run: Trainer) -> set[str]:
    """The names of the loss terms, filled as the run trains. Its curves contain other metrics as well."""
    names, watch = {"loss"}, run.guard.watch

    def note(step: int, losses: dict[str, Tensor], batch: Batch) -> None:
        names.update(losses)
        watch(step, losses, batch)

    run.guard.watch = note  # type: ignore[method-assign]
    return names


def losses(run: Trainer, names: set[str]) -> dict[str, float]:
    """The loss terms of the last step."""
    return {name: value for name, value in run.take_means().items() if name.removeprefix("train/") in names}


class Failed(Exception):
    """A method has no row."""


def side(job: dict, name: str, timeout: float = math.inf) -> dict:
    """Run one side in its own process."""
    command = [sys.executable, "-m", "bench.end_to_end", "--worker", json.dumps({**job, "side": name})]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, env=dict(os.environ), capture_output=True, text=True,
            timeout=None if timeout == math.inf else timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    memory = [line for line in done.stderr.splitlines() if "OutOfMemoryError" in line]
    return {"failed": "out of memory" if memory else f"ended with {done.returncode}:\n{done.stderr[-2000:]}"}
