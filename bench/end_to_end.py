"""``python -m bench.end_to_end``: a training step on the fused ops against the same step on the references.

Each side runs in its own process (its peak memory is its own) from the same seed on the same random batch of
full crops, and trains for some steps; forward, backward and optimiser are timed, the data is not. The losses
of both sides are compared step by step before any time is believed. Memory is the peak above what stays
between the steps.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.measure import peak, start_peak
from bench.run import commit, machine
from fastuda.data.batch import Batch
from fastuda.methods import METHODS, get_method
from fastuda.models import ModelConfig, build_model

HERE = Path(__file__).resolve().parent
COLUMNS = ("method", "backbone", "crop", "batch", "dtype", "fused_s", "reference_s", "ratio", "fused_mib",
           "reference_mib", "loss_difference", "machine", "torch", "commit", "date")  # fmt: skip
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


def random_batch(size: int, crop: tuple[int, int], classes: int, device: str) -> Batch:
    """Images whose colour follows blocks of labels, in both domains."""
    cells = torch.randint(0, classes, (2, size, crop[0] // 32 + 1, crop[1] // 32 + 1))
    label = cells.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, : crop[0], : crop[1]]
    colour = torch.randn(classes, 3)
    image = colour[label].permute(0, 1, 4, 2, 3) + 0.3 * torch.randn(2, size, 3, *crop)
    names = tuple(str(i) for i in range(size))
    return Batch(image[0], label[0].contiguous(), image[1], names, names).to(device)


def work(job: dict) -> dict[str, object]:
    """One side: seconds of each step, the losses, the peak memory above the network's."""
    torch.manual_seed(0)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    device = job["device"]
    cls = get_method(job["method"])
    model = build_model(ModelConfig(backbone=job["backbone"]), job["classes"])
    method = cls(cls.Config(**job["settings"]), model, job["classes"]).to(device).train()
    networks = method.networks()
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-4) for name, net in networks.items()}
    batch = random_batch(job["batch"], job["crop"], job["classes"], device)
    amp = torch.bfloat16 if job["dtype"] == "bfloat16" else None
    times, losses = [], []
    before = 0.0
    for step in range(job["steps"] + 1):
        if step == 1:  # the first one pays for compilation and caches
            before = start_peak(device)
        began = time.perf_counter()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        phases = method.phases(batch, step)
        terms = {}
        while True:
            with torch.autocast(torch.device(device).type, dtype=amp, enabled=amp is not None):
                phase = next(phases, None)
            if phase is None:
                break
            torch.stack([value.float() for value in phase.losses.values()]).sum().backward()
            terms |= {name: value.detach() for name, value in phase.losses.items()}
        for optimizer in optimizers.values():
            optimizer.step()
        method.after_step(step)
        losses.append({name: float(value) for name, value in terms.items()})
        times.append(time.perf_counter() - began)
    return {"seconds": times[1:], "losses": losses, "mib": peak(device) - before}


def side(job: dict, backend: str) -> dict:
    """The answer of one side's process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.end_to_end", "--worker", json.dumps(job)],
        cwd=HERE.parent, env={**os.environ, "FASTUDA_BACKEND": backend}, capture_output=True, text=True,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise SystemExit(f"{job['method']} on {backend} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def difference(fused: list[dict[str, float]], reference: list[dict[str, float]]) -> float:
    """The largest relative difference of any loss term at any step."""
    return max(
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-2)
        for a, b in zip(fused, reference, strict=True)
        for name in b
    )


def compare(job: dict) -> dict[str, object]:
    """One row."""
    fused, reference = side(job, "auto"), side(job, "reference")
    gap = difference(fused["losses"], reference["losses"])
    if not gap <= TOLERANCE[job["dtype"]]:
        raise SystemExit(f"{job['method']}: the losses differ by {gap:.2g}; no time is given for that")
    seconds = [statistics.median(x["seconds"]) for x in (fused, reference)]
    return {
        "method": job["method"], "backbone": job["backbone"], "crop": "x".join(map(str, job["crop"])),
        "batch": job["batch"], "dtype": job["dtype"], "fused_s": f"{seconds[0]:.3f}",
        "reference_s": f"{seconds[1]:.3f}", "ratio": f"{seconds[1] / seconds[0]:.2f}",
        "fused_mib": f"{fused['mib']:.0f}", "reference_mib": f"{reference['mib']:.0f}",
        "loss_difference": f"{gap:.1e}", "machine": machine(job["device"]), "torch": torch.__version__,
        "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        epilog="examples:\n  python -m bench.end_to_end --method plca --crop 736 736 --dtype bfloat16\n"
        "  python -m bench.end_to_end --csv bench/results/end_to_end.csv  # every method\n",
    )  # fmt: skip
    p.add_argument("--method", action="append", help="repeatable (default: every method)")
    p.add_argument("--backbone", default="resnet18", help="see fastuda.train --model")
    p.add_argument("--crop", nargs=2, type=int, default=(736, 736), metavar=("H", "W"))
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--classes", type=int, default=19)
    p.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=0, help="torch threads (0: as they are)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    p.add_argument("--csv", type=Path, help="append the rows to this file")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print("RESULT " + json.dumps(work(json.loads(args.worker))))
        return
    settings = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    rows = []
    for name in args.method or sorted(METHODS):
        job = {"method": name, "backbone": args.backbone, "crop": list(args.crop), "batch": args.batch_size,
               "dtype": args.dtype, "classes": args.classes, "steps": args.steps, "device": args.device,
               "threads": args.threads, "settings": settings}  # fmt: skip
        row = compare(job)
        rows.append(row)
        print(
            f"{name}: {row['fused_s']} s a step against {row['reference_s']} s ({row['ratio']} x),"
            f" {row['fused_mib']} against {row['reference_mib']} MiB, losses within {row['loss_difference']}",
            flush=True,
        )
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
