"""A long run under a supervisor that kills it again and again.

Trains one method on the built-in scenes on the CPU, with evaluation and checkpoints every minute or so, sends
``kill -9`` to the trainer every few minutes and starts it again with --resume auto, and trains the same run
undisturbed, afterwards or (--together) at the same time. Judges:

- both end bit for bit alike: weights, optimisers, random states, curves, model.safetensors;
- memory of the undisturbed run is flat: by the median slope of its samples after --warm-up, the trainer and
  its loader processes each grow by at most --slack MiB an hour (or 4 MiB over a shorter span: noise);
- the trainer's open files do not grow by more than 3 in the same way;
- no process outlives its killed trainer by more than 30 seconds.

In the first minutes memory grows and is not judged: the first evaluation, checkpoint and report import and
allocate what stays. Memory is what the process alone holds and what it shares with its loaders; files that
the kernel maps and drops as it likes do not count. At 5 steps a second 16 MiB an hour are 900 bytes a step,
less than a small tensor and the Python objects around it: a leak of one a step is found.

Leaves samples.csv and report.json in --out; exit code 1 where one of these does not hold. A run shorter than
its warm-up has no verdict on memory: "not judged".
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.program import command, curves, environment, equal, state, without_clocks  # noqa: E402

GRACE = 30.0
"""Seconds that a worker has to notice that its trainer is gone."""
NOISE = 4.0
"""MiB by which an idle allocator moves."""
FEWEST = 8
"""Samples that a slope needs."""


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
    """MiB that a process holds, shared memory included and mapped files not; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


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

    def watch(self, every: float) -> Iterator[dict[str, float]]:
        """Samples until the process ends."""
        while self.process.poll() is None:
            yield self.sample()
            try:
                self.process.wait(every)
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


def stamp(out: Path) -> tuple[int, int] | None:
    """Of the run's last checkpoint; None where there is none."""
    try:
        found = (out / "checkpoints" / "last.pt").stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def slope(seconds: list[float], values: list[float]) -> float:
    """Growth per second: the median over all pairs (Theil and Sen), which a few peaks do not move."""
    pairs = itertools.combinations(zip(seconds, values, strict=True), 2)
    return statistics.median((b - a) / (t - s) for (s, a), (t, b) in pairs)


def flat(samples: list[dict[str, float]], key: str, hourly: float, noise: float) -> tuple[float, bool] | None:
    """Growth per hour of ``key``, and whether it stays within ``hourly``, or within ``noise`` over the whole
    span; None where there is too little to judge."""
    if len(samples) < FEWEST:
        return None
    seconds = [s["seconds"] for s in samples]
    rate = slope(seconds, [s[key] for s in samples])
    return 3600 * rate, 3600 * rate <= hourly or rate * (seconds[-1] - seconds[0]) <= noise


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tests/soak/soak.py --minutes 60 --kill-every 240 --out /tmp/soak",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="an empty or absent folder")
    p.add_argument("--minutes", type=float, default=60, help="of training, at the speed of the first steps")
    p.add_argument("--steps", type=int, help="optimiser steps, instead of --minutes")
    p.add_argument(
        "--kill-every", type=float, default=240, help="mean seconds from a life's first checkpoint"
    )
    p.add_argument("--most-kills", type=int, help="then let it run to its end (default: no limit)")
    p.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints, evaluations")
    p.add_argument("--save-steps", type=int, help="steps between them, instead of --save-every")
    p.add_argument("--method", default="plca")
    p.add_argument("--crop", type=int, nargs=2, default=(64, 128))
    p.add_argument("--workers", type=int, default=2, help="loader processes")
    p.add_argument("--together", action="store_true", help="the undisturbed run at the same time")
    p.add_argument("--warm-up", type=float, default=300, help="seconds in which memory may grow")
    p.add_argument("--slack", type=float, default=16, help="MiB an hour by which it may grow after that")
    p.add_argument("--sample-every", type=float, default=5, help="seconds")
    p.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of fastuda.train")
    args = p.parse_intermixed_args()
    if args.out.exists() and any(args.out.iterdir()):
        p.error(f"{args.out} is not empty")
    return args


class Table(csv.DictWriter):
    """Rows of two threads."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.lock = threading.Lock()

    def writerow(self, row: Any) -> Any:
        with self.lock:
            return super().writerow(row)


class Undisturbed(threading.Thread):
    """One life to its end."""

    def __init__(self, args: list[object], log: Any, table: Any, every: float):
        super().__init__(daemon=True)
        self.args, self.log, self.table, self.every = args, log, table, every
        self.samples: list[dict[str, float]] = []
        self.code: int | None = None
        self.minutes = 0.0

    def run(self) -> None:
        life = Life(self.args, self.log)
        for sample in life.watch(self.every):
            self.samples.append(sample)
            self.table.writerow({"run": "calm", "life": 0, **sample})
        self.code, self.minutes = life.process.returncode, life.age / 60


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
    steps, every = args.steps, args.save_steps
    if not (steps and every):
        rate = speed(args, common, log)
        steps = steps or max(10, round(rate * 60 * args.minutes))
        every = every or max(1, round(rate * args.save_every))
    common += ["--steps", steps, f"checkpoint.every={every}", f"eval.every={every}", "--resume", "auto"]
    print(f"{steps} steps, a checkpoint every {every}", flush=True)
    with open(args.out / "samples.csv", "w", newline="", buffering=1) as file:
        fields = ["run", "life", "seconds", "trainer_mib", "children_mib", "handles", "children"]
        table = Table(file, fields)
        table.writeheader()
        calm = Undisturbed([*common, "--out", args.out / "calm"], log, table, args.sample_every)
        if args.together:
            calm.start()
        kills, orphans, lives = killed(args, common, log, table)
        print(f"{kills} kills, {lives} lives; now the undisturbed run", flush=True)
        if not args.together:
            calm.start()
        calm.join()
    report = judge(args, calm) | {
        "steps": steps, "kills": kills, "lives": lives, "orphans": orphans,
        "calm_minutes": round(calm.minutes, 1), "method": args.method,
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
    kills = orphans = lives = 0
    while True:
        before, saved = stamp(out), float("inf")
        patience = args.kill_every * generator.uniform(0.5, 1.5)
        life = Life([*common, "--out", out], log)
        for sample in life.watch(args.sample_every):
            table.writerow({"run": "killed", "life": lives, **sample})
            if stamp(out) != before:
                saved = min(saved, life.age)
            if life.age >= saved + patience and kills != args.most_kills:
                break
        lives += 1
        code = life.process.poll()
        if code is not None:
            if code or not (out / "result.json").is_file():
                raise SystemExit(f"the trainer ended with {code}; see {args.out / 'trainer.log'}")
            return kills, orphans, lives
        orphans += len(life.kill())
        kills += 1


def judge(args: argparse.Namespace, calm: Undisturbed) -> dict[str, Any]:
    """Compare the two runs, and the undisturbed one with itself."""
    a, b = args.out / "calm", args.out / "killed"
    same = calm.code == 0 and equal(without_clocks(state(a)), without_clocks(state(b)))
    same = same and curves(a) == curves(b)
    same = same and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    samples = calm.samples
    # a trainer that is ending holds less
    steady = [s for s in samples[:-2] if s["seconds"] >= args.warm_up]
    trainer, children = (flat(steady, f"{who}_mib", args.slack, NOISE) for who in ("trainer", "children"))
    files = flat(steady, "handles", 3, 3)
    unknown = "not judged"
    return {
        "same_end": same,
        "trainer_mib_per_hour": round(trainer[0], 2) if trainer else unknown,
        "children_mib_per_hour": round(children[0], 2) if children else unknown,
        "trainer_peak_mib": max((s["trainer_mib"] for s in samples), default=0.0),
        "memory_flat": trainer[1] and children[1] if trainer and children else unknown,
        "files_per_hour": round(files[0], 2) if files else unknown,
        "files_flat": files[1] if files else unknown,
        "most_children": max((s["children"] for s in samples), default=0),
        "samples": len(samples),
        "samples_judged": len(steady),
    }


if __name__ == "__main__":
    sys.exit(main())
