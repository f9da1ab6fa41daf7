"""The first minutes on a GPU: tests and measurements, the most valuable first, every stage with its own time
limit.

Part 1 takes at most 420 s: versions, the library products that the kernels use, the tests of values and
gradients, training, the main ops against their floor, profiles, a comparison of tile shapes and panel sizes,
the other ops, a training step end to end. Part 2 takes at most 210 s: the tests that failed in part 1,
compute-sanitizer, the best of the choices again, operator checks, float16 training.

If bench.gpu_kit has left its folder, nothing is built: the CUDA library and the compiled Triton kernels are
taken from there. Results are written at once into the output folder: summary.txt (a line per stage), log.txt
(all output), ops.csv, choices.csv, steps.csv and profile.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.gpu_kit import install
from bench.gpu_stages import Work
from bench.machine import commit
from fastuda import cli
from fastuda.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """\
  python -m bench.gpu_check /tmp/out
  python -m bench.gpu_check /tmp/out --part 2      # after part 1 into the same folder
  python -m bench.gpu_check /tmp/out --rehearse    # every stage on the CPU, small: no GPU is needed"""


@dataclass(frozen=True)
class Stage:
    """A separate process, which is killed after ``limit`` seconds."""

    name: str
    limit: int
    command: tuple[str, ...]
    """Arguments for Python."""


def inner(name: str, limit: int) -> Stage:
    """A stage that is a function of :class:`bench.gpu_stages.Work`."""
    return Stage(name, limit, ("-m", "bench.gpu_check", "{out}", "--stage", name))


def tests(name: str, limit: int, *arguments: str) -> Stage:
    """A stage that runs tests of tests/gpu."""
    return Stage(name, limit, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments))


VALUES = "value_and_gradient or many_panels or match or confusion or statistics"
TRAINING = "(three_steps and bf16) or does_not_wait or full_frame or graph_and_another_stream"
STEPS = ("-m", "bench.end_to_end", "--backbone", "resnet101", "--crop", "730", "730", "--batch-size", "4",
         "--steps", "3", "--workers", "8", "--csv", "{out}/steps.csv")  # fmt: skip

PARTS: dict[int, tuple[Stage, ...]] = {
    1: (
        inner("products", 20),
        tests("values", 70, "tests/gpu/test_ops.py", "-k", VALUES, "{workers}"),
        tests("training", 60, "tests/gpu", "-k", TRAINING, "{workers}"),
        inner("headline", 90),
        inner("profiles", 25),
        inner("choices", 50),
        inner("others", 50),
        Stage("step", 55, (*STEPS, "--method", "plca", "--budget", "50", "{device}")),
    ),
    2: (
        tests("failed", 40, "{failed}"),
        tests("sanitizer", 60, "tests/gpu/test_sanitizer.py", "-m", "gpu and slow", "-k", "memcheck"),
        inner("winners", 40),
        tests("operators", 40, "tests/gpu/test_ops.py", "-k", "opcheck or compiled", "{workers}"),
        tests("float16", 30, "tests/gpu/test_training.py", "-k", "three_steps and fp16", "{workers}"),
    ),
}
"""The stages of each part in order. The limits of part 1 add up to 420 s, those of part 2 to 210 s."""


class Check:
    """Runs the stages of a part and writes their results to ``out``."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.environment = dict(os.environ)

    def prepare(self, kit: Path) -> None:
        """Report versions and install the kit."""
        device = "no GPU" if self.rehearse else torch.cuda.get_device_name()
        self.say(f"{device}, torch {torch.__version__}, commit {commit()}, Python {sys.version.split()[0]}")
        self.environment |= install(kit, ROOT / "fastuda", self.say)
        if self.rehearse:
            self.environment["TRITON_INTERPRET"] = "1"

    def run(self, stage: Stage, left: float) -> bool:
        """Run a stage within its limit and the ``left`` seconds. Returns whether it succeeded."""
        command = [sys.executable, *self._filled(stage)]
        limit = min(stage.limit, left)
        began = time.monotonic()
        log = self.out / "log.txt"
        with log.open("a", encoding="utf-8") as stream:
            print(f"\n== {stage.name}: {' '.join(command[1:])}", file=stream, flush=True)
            start = stream.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # including the processes that it started
                process.wait()
                code = None
        with log.open(encoding="utf-8") as stream:
            stream.seek(start)
            lines = [line.strip() for line in stream if line.strip()]
        state = "ok" if code == 0 else f"cut off at {limit:.0f} s" if code is None else f"failed ({code})"
        self.say(f"{stage.name}: {state}, {time.monotonic() - began:.1f} s; {(lines or [''])[-1][:160]}")
        return code == 0

    def say(self, line: str) -> None:
        """Print a line and append it to the summary."""
        print(line, flush=True)
        with (self.out / "summary.txt").open("a", encoding="utf-8") as stream:
            print(line, file=stream)

    def _filled(self, stage: Stage) -> Iterator[str]:
        rehearsed = stage.command[:2] == ("-m", "pytest") and self.rehearse
        for argument in stage.command:
            if argument == "{workers}":
                if has_xdist() and not rehearsed:
                    yield from ("-n", "12", "--dist", "loadgroup")
            elif argument == "{failed}":
                yield from self._failed() or ["tests/gpu/test_training.py", "-k", "addresses"]
            elif argument == "{device}":
                yield from ("--device", "cpu" if self.rehearse else "cuda")
            else:
                yield argument.replace("{out}", str(self.out))
        if rehearsed:
            yield "--collect-only"
        if self.rehearse and stage.command[:2] == ("-m", "bench.end_to_end"):
            yield from ("--backbone", "small", "--crop", "64", "96", "--batch-size", "1", "--steps", "1",
                        "--workers", "0", "--budget", "300", "--dtype", "float32")  # fmt: skip

    def _failed(self) -> list[str]:
        """The tests that failed so far, by their pytest ids."""
        log = self.out / "log.txt"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        named = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR tests"))]
        return list(dict.fromkeys(named))[:40]


def has_xdist() -> bool:
    """Whether pytest-xdist is installed, so that several test processes can share the GPU."""
    return importlib.util.find_spec("xdist") is not None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.gpu_check", __doc__ or "", EXAMPLES)
    p.add_argument(
        "out", type=cli.a_path, metavar="DIR", help="folder for the results, created if it does not exist"
    )
    p.add_argument("--part", type=int, choices=tuple(PARTS), default=1, help="which part (default: 1)")
    p.add_argument(
        "--kit", type=cli.a_path, default=ROOT / "build" / "gpu-kit", metavar="DIR",
        help="folder that bench.gpu_kit wrote (default: build/gpu-kit)",
    )  # fmt: skip
    p.add_argument("--rehearse", action="store_true", help="run every stage on the CPU, small, without tests")
    p.add_argument("--stage", help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Run the stages of a part."""
    args = build_parser().parse_args()
    if args.stage:
        getattr(Work(args.out, os.environ.get("TRITON_INTERPRET") == "1"), args.stage)()
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no CUDA device here; --rehearse needs none")
    args.out.mkdir(parents=True, exist_ok=True)
    check = Check(args.out, args.rehearse)
    check.prepare(args.kit)
    stages = PARTS[args.part]
    end = time.monotonic() + sum(stage.limit for stage in stages) * (10 if args.rehearse else 1)
    failed = []
    for stage in stages:
        left = end - time.monotonic()
        if left < 5:
            check.say(f"{stage.name}: no time was left")
        elif not check.run(replace(stage, limit=stage.limit * (10 if args.rehearse else 1)), left):
            failed.append(stage.name)
    if failed:
        raise UserError(f"not all went well: {', '.join(failed)}; see {args.out / 'log.txt'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
