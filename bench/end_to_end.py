"""``python -m bench.end_to_end``: training steps on the fused ops against the published formulations.

Each side runs in its own process (its peak memory is its own): the trainer itself, from the same seed on the
same scenes, once on ``fastuda.ops`` and once on the formulations of the authors' code (bench/published.py).
The losses of both sides are compared over the first steps before any time is believed. Memory is the peak
above what stays between the steps. The shares of the step's parts are those of ``python -m fastuda.profile``,
over one more step; where the ops' share of a published step is s, no ops make that step more than 1 / (1 - s)
times as fast.

A row is written as soon as a method is through. Where the published formulation fails, by running out of
memory say, the row has the other side alone.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import published, table
from bench.measure import peak, start_peak
from bench.run import commit, machine
from fastuda import distributed
from fastuda.config import resolve
from fastuda.data.scenes import ScenesConfig, ensure_scenes
from fastuda.loggers import setup_logging
from fastuda.memory import keep_freed_memory
from fastuda.methods import METHODS
from fastuda.profiling import PARTS, profile_step
from fastuda.trainer import Trainer

HERE = Path(__file__).resolve().parent
SIDES = ("fused", "published")
COLUMNS = (
    *("method", "backbone", "crop", "batch", "dtype", "fused_s", "published_s", "ratio", "fused_mib"),
    *("published_mib", "loss_difference"),
    *(f"{side}_{part}" for side in SIDES for part in PARTS),
    *("largest_op", "machine", "torch", "commit", "date"),
)
COMPARED = 4
"""Steps whose losses are compared: later ones part by rounding alone."""
ORDER = ("plca", "asanet", "fada", "sepico", "weakseg", "self_training", "source_only")
"""What the time is spent on first."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
SETTINGS = {
    "source_only": {"lovasz_weight": 0.0},
    "plca": {"lovasz_weight": 0.75, "association_weight": 0.1},
    "sepico": {"contrast_start": 0, "width": 512},
    "weakseg": {"category_width": None},
}
"""The published ones, and SePiCo's contrast on from the first step, where the shipped configuration of the
scenes has others."""


def trainer(job: dict, folder: Path) -> Trainer:
    """Of one method on scenes of the crop's size, read in the trainer's own process."""
    scenes = ScenesConfig(source=4, target=4, evaluation=1, height=job["crop"][0], width=job["crop"][1])
    root = Path(job.get("root") or folder)
    ensure_scenes(root / "scenes", scenes, quiet=True)
    settings = {**SETTINGS.get(job["method"], {}), **job["settings"]}
    chosen = {
        "method.name": job["method"], "data.data_root": str(root), "data.crop": job["crop"],
        "data.batch_size": job["batch"], "data.workers": job.get("workers", 0), "data.loader": "torch",
        "data.check_labels": 1,
        "model.backbone": job["backbone"], "optim.lr": 1e-4, "optim.warmup": 0, "train.device": job["device"],
        "train.amp": "bf16" if job["dtype"] == "bfloat16" else "off", "log.tensorboard": False,
        "train.keep_memory": False,
    }  # fmt: skip
    config = resolve(None, chosen | {f"method.{key}": value for key, value in settings.items()}, {})
    return Trainer(config, folder / "run", distributed.start(job["device"]), quiet=True)


def losses(run: Trainer) -> dict[str, float]:
    """Every term of the step that was made last."""
    return {name: value for name, value in run._take_means().items() if name.startswith("train/")}


def work(job: dict) -> dict[str, object]:
    """One side: seconds and losses of each step, the peak memory above the network's, the shares."""
    if job["side"] == "published":
        published.use()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    setup_logging(quiet=True)
    device = job["device"]
    times, terms = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(job, Path(folder))
        run.method.train()
        before = highest = 0.0
        for step in range(job["steps"] + 3):
            if step == 1:  # the first one pays for compilation and caches
                before = start_peak(device)
            elif step == 2:
                highest = peak(device)
                if device == "cpu":  # as the trainer does; this step takes what the later ones use again
                    keep_freed_memory()
            began = time.perf_counter()
            run._train_step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            terms.append(losses(run))
        found = profile_step(run, warm_up=0, steps=1)
        run.loader.close()
    return {"seconds": times[3:], "losses": terms, "mib": highest - before, "share": found.share,
            "ops": found.ops}  # fmt: skip


def side(job: dict, name: str, timeout: float = math.inf) -> dict:
    """The answer of one side's process, or why there is none."""
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


def difference(fused: list[dict[str, float]], truth: list[dict[str, float]]) -> float:
    """The largest relative difference of any loss term at any step."""
    return max(
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-2)
        for a, b in zip(fused, truth, strict=True)
        for name in b
    )


class Failed(Exception):
    """There is no row."""


def compare(job: dict, timeout: float = math.inf) -> dict[str, object]:
    """One row, of both sides within ``timeout`` seconds.

    Raises:
        Failed: the fused side did not end well, or the losses differ.
    """
    end = time.monotonic() + timeout
    fused, truth = (side(job, name, max(end - time.monotonic(), 1.0)) for name in SIDES)
    if "failed" in fused:
        raise Failed(f"{job['method']}, fused, {fused['failed']}")
    seconds = statistics.median(fused["seconds"])
    row: dict[str, object] = {
        "method": job["method"], "backbone": job["backbone"], "crop": "x".join(map(str, job["crop"])),
        "batch": job["batch"], "dtype": job["dtype"], "fused_s": f"{seconds:.3f}",
        "fused_mib": f"{fused['mib']:.0f}",
    }  # fmt: skip
    if "failed" in truth:
        print(f"{job['method']}, published, {truth['failed']}", flush=True)
        truth["share"] = dict.fromkeys(PARTS, math.nan)
        row |= dict.fromkeys(("published_s", "ratio", "published_mib", "loss_difference", "largest_op"), "")
    else:
        gap = difference(fused["losses"][:COMPARED], truth["losses"][:COMPARED])
        if not gap <= TOLERANCE[job["dtype"]]:
            raise Failed(f"{job['method']}: the losses differ by {gap:.2g}; no time is given for that")
        published = statistics.median(truth["seconds"])
        row |= {"published_s": f"{published:.3f}", "ratio": f"{published / seconds:.2f}",
                "published_mib": f"{truth['mib']:.0f}", "loss_difference": f"{gap:.1e}",
                "largest_op": max(truth["ops"], key=truth["ops"].get, default="")}  # fmt: skip
    for name, found in zip(SIDES, (fused, truth), strict=True):
        row |= {f"{name}_{part}": f"{found['share'][part]:.3f}" for part in PARTS}
    threads = "" if job["device"] == "cuda" else f" x{job['threads'] or torch.get_num_threads()}"
    return row | {
        "machine": f"{machine(job['device'])}{threads}", "torch": torch.__version__,
        "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def told(row: dict[str, object]) -> str:
    """A row in a line."""
    shares = ", ".join(f"{part} {100 * float(str(row[f'fused_{part}'])):.0f}%" for part in PARTS)
    text = f"{row['method']}: {1 / float(str(row['fused_s'])):.2f} steps/s"
    if row["ratio"]:
        text += f" against {1 / float(str(row['published_s'])):.2f} ({row['ratio']} x)"
    text += f", {row['fused_mib']} MiB"
    if row["ratio"]:
        text += f" against {row['published_mib']} MiB, losses within {row['loss_difference']}"
    return f"{text}; {shares}"


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        epilog="examples:\n  python -m bench.end_to_end --method plca --crop 736 736 --steps 1\n"
        "  python -m bench.end_to_end --csv bench/results/end_to_end.csv  # every method, into the README\n",
    )  # fmt: skip
    p.add_argument("--method", action="append", help="repeatable (default: every method)")
    p.add_argument("--backbone", default="resnet18", help="see fastuda.train --model")
    p.add_argument("--crop", nargs=2, type=int, default=(512, 512), metavar=("H", "W"))
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=0, help="torch threads (0: as they are)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    p.add_argument("--workers", type=int, default=0, help="loader processes of either side")
    p.add_argument("--budget", type=float, default=math.inf, help="seconds for all methods")
    p.add_argument("--csv", type=Path, help="append the rows to this file")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print("RESULT " + json.dumps(work(json.loads(args.worker))))
        return
    settings = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    every = sorted(METHODS, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    deadline = time.monotonic() + args.budget
    failed = []
    with tempfile.TemporaryDirectory() as root:
        for name in args.method or every:
            left = deadline - time.monotonic()
            if left <= 0:
                failed.append(f"{name}: no time was left")
                continue
            job = {"method": name, "backbone": args.backbone, "crop": list(args.crop),
                   "batch": args.batch_size, "dtype": args.dtype, "steps": args.steps,
                   "device": args.device, "threads": args.threads, "settings": settings,
                   "workers": args.workers, "root": root}  # fmt: skip
            try:
                row = compare(job, left)
            except Failed as reason:
                failed.append(str(reason))
                print(reason, flush=True)
                continue
            print(told(row), flush=True)
            if args.csv:
                append(args.csv, row)
    if args.csv and args.csv.resolve().parent == HERE / "results":
        table.write()
    if failed:
        raise SystemExit("\n".join(["there is no row for", *failed]))


def append(path: Path, row: dict[str, object]) -> None:
    """Write a row behind the others."""
    new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
