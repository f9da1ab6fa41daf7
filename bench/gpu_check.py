"""The first minutes on a GPU: tests and measurements, the most valuable first, every stage with its own time
limit.

Part 1 takes at most 420 s: versions, the library products that the kernels use, the tests of values and
gradients, training, the main ops against their floor, profiles, a comparison of tile shapes and panel sizes,
the other ops, a training step end to end. Part 2 takes at most 210 s: the tests that failed in part 1,
compute-sanitizer, the best of the choices again, operator checks, float16 training.

If bench.gpu_kit has left its folder, nothing is built: the CUDA library and the compiled Triton kernels are
taken from there. Results are written at once into the output folder: summary.txt (a line per stage), log.txt
(all output), ops.csv, choices.csv, steps.csv, profile.txt and the logs of compute-sanitizer.
"""
# ruff: noqa: E402

from __future__ import annotations

import time

STARTED = time.monotonic()
"""The time of the imports counts: a new machine reads torch from its disk first."""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.gpu_kit import commit_of, compiled, install
from bench.gpu_stages import Work
from fastuda import cli
from fastuda.errors import UserError
from fastuda.ops import _backends

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """\
  python -m bench.gpu_check /tmp/out
  python -m bench.gpu_check /tmp/out --part 2      # after part 1 into the same folder
  python -m bench.gpu_check /tmp/out --part 2 --after build/part1    # part 1's results are in build/part1
  python -m bench.gpu_check /tmp/out --rehearse    # every stage on the CPU, small: no GPU is needed"""


@dataclass(frozen=True)
class Stage:
    """A separate process, which is killed after ``limit`` seconds."""

    name: str
    limit: int
    command: tuple[str, ...]
    """Arguments for Python."""

    @property
    def tests(self) -> bool:
        """Whether it runs pytest."""
        return self.command[:2] == ("-m", "pytest")


def inner(name: str, limit: int) -> Stage:
    """A stage that is a function of :class:`bench.gpu_stages.Work`."""
    command = ("-m", "bench.gpu_check", "{out}", "--stage", name, "--after", "{after}", "--kit", "{kit}")
    return Stage(name, limit, command)


def tests(name: str, limit: int, *arguments: str) -> Stage:
    """A stage that runs tests of tests/gpu. With -v every test is named when it ends, so that the failures
    of a stage that is cut off are known."""
    return Stage(name, limit, ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *arguments))


VALUES = "value_and_gradient or many_panels or match or confusion or are_built"
TRAINING = "(three_steps and bf16) or does_not_wait or full_frame or graph_and_another_stream or captured"
SANITIZED = "memcheck and float32"

PARTS: dict[int, tuple[Stage, ...]] = {
    1: (
        inner("products", 20),
        tests("values", 70, "tests/gpu/test_ops.py", "-k", VALUES, "{workers}"),
        tests("training", 60, "tests/gpu", "-k", TRAINING, "{workers}"),
        inner("headline", 90),
        inner("profiles", 20),
        inner("choices", 50),
        inner("others", 45),
        inner("step", 50),
    ),
    2: (
        tests("failed", 40, "{failed}", "{workers}"),
        tests("sanitizer", 60, "tests/gpu/test_sanitizer.py", "-m", "gpu and slow", "-k", SANITIZED,
              "--basetemp", "{out}/sanitizer"),
        inner("winners", 35),
        tests("operators", 35, "tests/gpu/test_ops.py", "-k", "opcheck or compiled", "{workers}"),
        tests("float16", 25, "tests/gpu/test_training.py", "-k", "three_steps and fp16", "{workers}"),
    ),
}  # fmt: skip
"""The stages of each part in order."""
TOTAL = {1: 420, 2: 210}
"""Seconds of each part: the limits of its stages, and 15 for the imports and the kit."""


class Check:
    """Runs the stages of a part and writes their results to ``out``; ``after`` has those of part 1."""

    def __init__(self, out: Path, rehearse: bool, after: Path, kit: Path) -> None:
        self.out, self.rehearse, self.after, self.kit = out, rehearse, after, kit
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", "FASTUDA_SANITIZER_SECONDS": "25"}

    def prepare(self) -> None:
        """Report versions and install the kit."""
        device = "no GPU" if self.rehearse else torch.cuda.get_device_name()
        versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
        self.say(f"{device}, {versions}, commit {commit_of(self.kit) or 'unknown'}")
        try:
            self.environment |= install(self.kit, ROOT / "fastuda", self.say)
        except Exception as error:  # without the kit the kernels are compiled when needed
            self.say(f"the kit in {self.kit} is not used: {type(error).__name__}: {error}")
        self.say(_backends._load_cuda() or "the CUDA kernels are loaded")
        if self.rehearse:
            self.environment["TRITON_INTERPRET"] = "1"

    def run(self, stage: Stage, left: float) -> bool:
        """Run a stage within its limit and the ``left`` seconds. Returns whether it succeeded."""
        command = [sys.executable, *self._filled(stage)]
        environment = self.environment | ({"OMP_NUM_THREADS": "2"} if stage.tests else {})
        limit = min(stage.limit, left)
        began = time.monotonic()
        log = self.out / "log.txt"
        with log.open("a", encoding="utf-8") as stream:
            print(f"\n== {stage.name}: {' '.join(command[1:])}", file=stream, flush=True)
            start = stream.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # including the processes that it started
                with suppress(subprocess.TimeoutExpired):  # a process in the driver may not end
                    process.wait(5)
                code = None
        with log.open(encoding="utf-8", errors="replace") as stream:
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
        rehearsed = stage.tests and self.rehearse
        for argument in stage.command:
            if argument == "{workers}":
                if has_xdist() and not rehearsed:
                    yield from ("-n", "12", "--dist", "loadgroup")
            elif argument == "{failed}":
                none = ("tests/gpu/test_training.py", "-k", "addresses")
                yield from failed(self.after / "log.txt")[:40] or none
            else:
                yield argument.format(out=self.out, after=self.after, kit=self.kit)
        if rehearsed:
            yield "--collect-only"


def failed(log: Path) -> list[str]:
    """The ids of the tests that failed according to pytest's output, which may end anywhere. pytest-xdist
    adds the group of a test to its id."""
    if not log.exists():
        return []
    text = log.read_text(encoding="utf-8", errors="replace")
    told = r"(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$|^(tests/.*?) (?:FAILED|ERROR)\b"
    named = ("".join(pair).strip() for pair in re.findall(told, text, re.MULTILINE))
    return list(dict.fromkeys(re.sub(r"@\w+$", "", name) for name in named))


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
        "--after",
        type=cli.a_path,
        metavar="DIR",
        help="folder with the results of part 1 (default: the same)",
    )
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
    after = args.after or args.out
    if args.stage:
        rehearse = os.environ.get("TRITON_INTERPRET") == "1"
        getattr(Work(args.out, rehearse, after, commit_of(args.kit)), args.stage)()
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no CUDA device here; --rehearse needs none")
    args.out.mkdir(parents=True, exist_ok=True)
    check = Check(args.out, args.rehearse, after, args.kit)
    check.prepare()
    if args.part == 2 and not (after / "log.txt").exists():
        check.say(f"{after} has no results of part 1 (--after DIR)")
    cache = Path(check.environment.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    before = compiled(cache)
    times = 10 if args.rehearse else 1
    end = STARTED + TOTAL[args.part] * times
    bad = []
    for stage in PARTS[args.part]:
        left = end - time.monotonic()
        if left < 5:
            check.say(f"{stage.name}: no time was left")
        elif not check.run(replace(stage, limit=stage.limit * times), left):
            bad.append(stage.name)
    check.say(f"{compiled(cache) - before} Triton kernels were compiled here; {before} were there before")
    if bad:
        raise UserError(f"not all went well: {', '.join(bad)}; see {args.out / 'log.txt'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
