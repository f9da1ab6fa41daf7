"""A long run under a supervisor that kills it again and again.

Trains one method on the built-in scenes on the CPU, with evaluation and checkpoints every minute or so, sends
``kill -9`` to the trainer every few minutes and starts it again with --resume auto, and then trains the same
run undisturbed. Judges:

- both end bit for bit alike: weights, optimisers, random states, curves, model.safetensors;
- memory of the undisturbed run is flat: the mean of the trainer's resident size over the last quarter of its
  samples is at most --slack above that of the second quarter;
- the trainer's open files do not grow in the same way;
- no process outlives its killed trainer by more than 30 seconds.

Leaves samples.csv and report.json in --out; exit code 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.program import command, curves, environment, equal, state, without_clocks  # noqa: E402

GRACE = 30.0
"""Seconds that a worker has to notice that its trainer is gone."""


def session(leader: int) -> list[int]:
    """The processes of the session that ``leader`` began, itself included, but for zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def resident(pid: int) -> float:
    """MiB of a process, 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Life:
    """One trainer process, watched."""

    def __init__(self, args: list[object], log: Any):
        self.process = subprocess.Popen(
            command("train", *args), cwd=ROOT, env=environment(), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        self.began = time.monotonic()

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def sample(self) -> dict[str, float]:
        """What the trainer and its children hold now."""
        pid = self.process.pid
        children = [other for other in session(pid) if other != pid]
        try:
            handles = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            handles = 0
        return {
            "seconds": round(self.age, 1),
            "trainer_mib": round(resident(pid), 1),
            "children_mib": round(sum(map(resident, children)), 1),
            "handles": handles,
            "children": len(children),
        }

    def watch(self, until: float, every: float) -> Iterator[dict[str, float]]:
        """Samples until the process ends or is ``until`` seconds old."""
        while self.process.poll() is None and self.age < until:
            yield self.sample()
            try:
                self.process.wait(max(0.0, min(every, until - self.age)))
            except subprocess.TimeoutExpired:
                continue

    def kill(self) -> list[int]:
        """``kill -9``; the processes of its session that are still there after the grace."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + GRACE
        left = session(self.process.pid)
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = session(self.process.pid)
        return left


def reached(out: Path) -> int:
    """The step of the run's last checkpoint; 0 where there is none."""
    try:
        return int(state(out)["step"])
    except FileNotFoundError:
        return 0


def growth(values: list[float]) -> float:
    """The mean of the last quarter less that of the second."""
    n = len(values)
    second, last = values[n // 4 : n // 2], values[3 * n // 4 :]
    return sum(last) / len(last) - sum(second) / len(second) if n >= 8 else 0.0


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tests/soak/soak.py --minutes 60 --kill-every 240 --out /tmp/soak",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="an empty or absent folder")
    p.add_argument("--minutes", type=float, default=60, help="of training, at the speed of the first steps")
    p.add_argument("--steps", type=int, help="optimiser steps, instead of --minutes")
    p.add_argument("--kill-every", type=float, default=240, help="mean seconds between kills")
    p.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints, evaluations")
    p.add_argument("--method", default="plca")
    p.add_argument("--crop", type=int, nargs=2, default=(64, 128))
    p.add_argument("--workers", type=int, default=2, help="loader processes")
    p.add_argument("--slack", type=float, default=16, help="MiB by which memory may differ")
    p.add_argument("--sample-every", type=float, default=5, help="seconds")
    p.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of fastuda.train")
    args = p.parse_intermixed_args()
    if args.out.exists() and any(args.out.iterdir()):
        p.error(f"{args.out} is not empty")
    if args.save_every > args.kill_every / 2:
        args.save_every = args.kill_every / 4  # a life that reaches no checkpoint gets nowhere
    return args


def speed(args: argparse.Namespace, common: list[object], log: Any) -> float:
    """Steps per second of a short run."""
    out, steps = args.out / "speed", 30
    Life([*common, "--out", out, "--steps", steps, "log.every=1"], log).process.wait()
    with open(out / "metrics.csv", newline="") as file:
        seconds = [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "perf/step_s"]
    return 1 / (sum(seconds[5:]) / len(seconds[5:]))


def main() -> int:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    log = open(args.out / "trainer.log", "ab")  # noqa: SIM115
    common: list[object] = [
        "--method", args.method, "--data-root", args.out / "data", "--crop", *args.crop, "--batch-size", 2,
        "--workers", args.workers, "--device", "cpu", "--quiet", "train.baseline=off", *args.overrides,
    ]  # fmt: skip
    _draw(args.out / "data" / "scenes", tuple(args.crop))
    rate = speed(args, common, log)
    steps = args.steps or max(10, round(rate * 60 * args.minutes))
    every = max(1, round(rate * args.save_every))
    common += ["--steps", steps, f"checkpoint.every={every}", f"eval.every={every}", "--resume", "auto"]
    print(f"{rate:.1f} steps/s: {steps} steps, a checkpoint every {every}", flush=True)
    with open(args.out / "samples.csv", "w", newline="", buffering=1) as file:
        fields = ["run", "life", "seconds", "trainer_mib", "children_mib", "handles", "children"]
        table = csv.DictWriter(file, fields)
        table.writeheader()
        kills, orphans, lives = killed(args, common, log, table)
        print(f"{kills} kills, {lives} lives; now undisturbed", flush=True)
        calm = Life([*common, "--out", args.out / "calm"], log)
        samples = []
        for sample in calm.watch(float("inf"), args.sample_every):
            samples.append(sample)
            table.writerow({"run": "calm", "life": 0, **sample})
    report = judge(args, calm, samples) | {
        "steps": steps, "kills": kills, "lives": lives, "orphans": orphans,
        "calm_minutes": round(calm.age / 60, 1), "method": args.method,
    }  # fmt: skip
    report["passed"] = not orphans and all(report[name] for name in ("same_end", "memory_flat", "files_flat"))
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


def _draw(folder: Path, size: tuple[int, int]) -> None:
    from fastuda.data.scenes import ScenesConfig, ensure_scenes

    config = ScenesConfig(source=40, target=40, evaluation=10, height=size[0], width=size[1])
    ensure_scenes(folder, config, quiet=True)


def killed(args: argparse.Namespace, common: list[object], log: Any, table: Any) -> tuple[int, int, int]:
    """Train ``killed/`` to its end through kills: their number, the processes left over, the lives."""
    out, generator = args.out / "killed", random.Random(args.seed)
    kills = orphans = lives = idle = 0
    while True:
        before = reached(out)
        life = Life([*common, "--out", out], log)
        until = args.kill_every * generator.uniform(0.5, 1.5)
        for sample in life.watch(until, args.sample_every):
            table.writerow({"run": "killed", "life": lives, **sample})
        lives += 1
        code = life.process.poll()
        if code is not None:
            if code or not (out / "result.json").is_file():
                raise SystemExit(f"the trainer ended with {code}; see {args.out / 'trainer.log'}")
            return kills, orphans, lives
        orphans += len(life.kill())
        kills += 1
        idle = 0 if reached(out) > before else idle + 1
        if idle == 5:
            raise SystemExit("five lives without a checkpoint: choose a longer --kill-every")


def judge(args: argparse.Namespace, calm: Life, samples: list[dict[str, float]]) -> dict[str, Any]:
    """Compare the two runs, and the undisturbed one with itself."""
    a, b = args.out / "calm", args.out / "killed"
    same = calm.process.returncode == 0 and equal(without_clocks(state(a)), without_clocks(state(b)))
    same = same and curves(a) == curves(b)
    same = same and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    # a trainer that has just begun, and one that is ending, hold less
    steady = samples[2:-2]
    memory = growth([s["trainer_mib"] for s in steady])
    files = growth([s["handles"] for s in steady])
    return {
        "same_end": same,
        "memory_growth_mib": round(memory, 1),
        "memory_peak_mib": max((s["trainer_mib"] for s in samples), default=0.0),
        "memory_flat": memory <= args.slack,
        "files_growth": round(files, 1),
        "files_flat": files <= 3,
        "most_children": max((s["children"] for s in samples), default=0),
        "samples": len(samples),
    }


if __name__ == "__main__":
    sys.exit(main())
