"""The first minutes on a GPU: what is right, what is fast, most valuable first, every stage under its own
time limit.

Part 1 takes at most 420 s: versions, the library's products that the kernels rest on, the tests of values and
gradients, training, the headline against its floor, profiles, tile shapes and panel sizes beside each other,
the other ops, a training step end to end. Part 2 takes at most 210 s: the tests that failed in part 1,
compute-sanitizer, the best of the choices again, operator checks, float16 training.

Nothing is built where bench.gpu_kit has left its folder: the CUDA library and the compiled Triton kernels are
taken from there. Results are written as they come, into the folder's summary.txt (a line a stage), log.txt
(all output), ops.csv, choices.csv, steps.csv and profile.txt.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from bench import measure, table
from bench.case import Case
from bench.gpu_kit import install
from bench.machine import commit, machine
from bench.registry import CASES
from bench.rows import append_rows
from bench.run import GPU_FIRST
from fastuda import cli
from fastuda.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """\
  python -m bench.gpu_check /tmp/out
  python -m bench.gpu_check /tmp/out --part 2      # after part 1 into the same folder
  python -m bench.gpu_check /tmp/out --rehearse    # every stage on the CPU, small: no GPU is needed"""
CHOICES = ("choice", "op", "dtype", "shape", "ms", "error", "note")


@dataclass(frozen=True)
class Stage:
    """A process of its own, which is ended after ``limit`` seconds."""

    name: str
    limit: int
    command: tuple[str, ...]
    """Arguments of Python."""


def inner(name: str, limit: int) -> Stage:
    """A stage that is a function of this module."""
    return Stage(name, limit, ("-m", "bench.gpu_check", "{out}", "--stage", name))


def tests(name: str, limit: int, *arguments: str) -> Stage:
    """A stage of tests/gpu."""
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
"""What is run, in this order; the limits of part 1 add up to 420 s, of part 2 to 210 s."""


class Check:
    """The stages of a part, and what they leave in ``out``."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.environment = dict(os.environ)

    def prepare(self, kit: Path) -> None:
        """Versions, and what the kit spares."""
        device = "no GPU" if self.rehearse else torch.cuda.get_device_name()
        self.say(f"{device}, torch {torch.__version__}, commit {commit()}, Python {sys.version.split()[0]}")
        self.environment |= install(kit, ROOT / "fastuda", self.say)
        if self.rehearse:
            self.environment["TRITON_INTERPRET"] = "1"

    def run(self, stage: Stage, left: float) -> bool:
        """Run a stage within its limit and the ``left`` seconds; whether it ended well."""
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
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
                code = None
        with log.open(encoding="utf-8") as stream:
            stream.seek(start)
            lines = [line.strip() for line in stream if line.strip()]
        state = "ok" if code == 0 else f"cut off at {limit:.0f} s" if code is None else f"failed ({code})"
        self.say(f"{stage.name}: {state}, {time.monotonic() - began:.1f} s; {(lines or [''])[-1][:160]}")
        return code == 0

    def say(self, line: str) -> None:
        """A line of the summary, printed at once."""
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
        """The tests that failed so far, as pytest named them."""
        log = self.out / "log.txt"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        named = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR tests"))]
        return list(dict.fromkeys(named))[:40]


def has_xdist() -> bool:
    """Whether tests can share the card."""
    return importlib.util.find_spec("xdist") is not None


class Work:
    """The stages that are functions: on the GPU, or small on the CPU."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out, self.device = out, "cpu" if rehearse else "cuda"
        self.rehearse = rehearse

    def sized(self, case: Case) -> Case:
        """The case, small in a rehearsal."""
        if not self.rehearse:
            return case
        return replace(case, pixels=64, channels=min(case.channels, 512), batch=1)

    def answer(self, case: Case, provider: str) -> dict:
        """What :func:`bench.measure.answer` says of one measurement."""
        job = {"case": vars(self.sized(case)), "provider": provider, "device": self.device, "repeats": 5}
        if self.rehearse:
            with mock.patch.multiple(measure, CHECK_PIXELS=32, settle=lambda step: None):
                return measure.answer(job | {"repeats": 1})
        return measure.answer(job)

    def measured(self, cases: list[Case], providers: tuple[str, ...]) -> None:
        """Rows of ``ops.csv``."""
        place = {"machine": machine(self.device), "device": self.device, "torch": torch.__version__,
                 "commit": commit(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        for case in cases:
            shape = self.sized(case).shape
            common = {"op": case.op, "mode": case.mode, "dtype": case.dtype, "shape": shape, **place}
            floor = self.answer(case, "floor").get("floor")
            reference = None
            for provider in providers:
                answer = self.answer(case, provider)
                if "skipped" in answer:
                    continue
                row = {**common, "provider": provider, "note": answer.get("failed", "")}
                if "p50" in answer:
                    time_ms = answer["p50"]
                    reference = time_ms if provider == "reference" else reference
                    row |= {key: f"{answer[key]:.4f}" for key in ("p20", "p50", "p80")}
                    row |= {"extra_mib": f"{answer['extra_mib']:.1f}", "error": f"{answer['error']:.1e}"}
                    row |= {"floor_ms": f"{floor:.4f}", "to_floor": f"{time_ms / floor:.2f}"} if floor else {}
                    row |= {"to_reference": f"{time_ms / reference:.3f}"} if reference else {}
                append_rows(self.out / "ops.csv", table.COLUMNS, [row])
                told = f"{row['p50']} ms, {row.get('to_floor')} of floor" if "p50" in row else row["note"]
                print(f"{case.op} {case.mode} {case.dtype} {shape} {provider}: {told}", flush=True)

    def products(self) -> None:
        """The products of the library that the kernels rest on, against float64: into float32 from half
        precision, added to what is there, of transposed and odd strides.

        Raises:
            UserError: one is wrong.
        """
        from fastuda.kernels._common import add_product, product

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wide = torch.randn(300, 272, device=self.device).to(dtype)
            x = torch.randn(265, 64, device=self.device).to(dtype)
            panel = wide[:, :265]  # rows of 272, of which 265 count
            for name, a, b in (
                ("plain", panel, x),
                ("transposed", panel.T, wide[:, :64]),
                ("both", x.T, panel.T),
            ):
                exact = a.double() @ b.double()
                out = torch.full(exact.shape, torch.nan, device=self.device)
                product(a, b, out)
                added = torch.ones_like(out)
                add_product(added, a, b)
                for said, error in (("mm", out - exact), ("addmm", added - 1 - exact)):
                    worst = (error.abs().max() / exact.abs().max()).item()
                    print(f"{said} {dtype} {name}: error {worst:.1e}", flush=True)
                    if not worst < 1e-5:
                        raise UserError(f"{said} of {dtype}, {name}: error {worst:.1e} of the largest value")

    def headline(self) -> None:
        """The ops of similarities at the crop of training, and what else does them."""
        if not self.rehearse:
            for row in measure.ceilings("cuda", 3):
                print(row["op"], row["dtype"], row["note"], flush=True)
        self.measured(GPU_FIRST[:2], ("fastuda", "graph", "triton", "reference", "authors", "sdpa"))
        kl = [case for case in GPU_FIRST if case.similarity == "kl"]
        self.measured(kl, ("fastuda", "graph", "reference", "authors"))
        self.measured(
            [case for case in GPU_FIRST if case.op == "cycle_match"], ("fastuda", "triton", "reference")
        )

    def others(self) -> None:
        """All other ops, the full frame, the headline in float32."""
        cases = [case for case in CASES if case.moved and case.channels < 4096 and case.mode == "fwd+bwd"]
        cases += [case for case in CASES if case.op in ("upsample_confusion", "class_statistics")]
        # the interpreter takes long for these kernels, and the tests have it run them
        second = () if self.rehearse else ("graph", "triton")
        self.measured(cases, ("fastuda", *second, "reference"))
        self.measured(GPU_FIRST[2:6], ("fastuda", "triton", "reference"))

    def profiles(self) -> None:
        """Kernels by time of the ops of similarities, into ``profile.txt``."""
        from torch.profiler import ProfilerActivity, profile

        from bench.providers import PROVIDERS
        from bench.registry import make_inputs

        activity = ProfilerActivity.CPU if self.rehearse else ProfilerActivity.CUDA
        for case in [*GPU_FIRST[:2], *(case for case in GPU_FIRST if case.similarity == "kl")]:
            small = self.sized(case)
            inputs = make_inputs(small, self.device)
            run = PROVIDERS["fastuda"](small)
            leaves = [x for x in inputs.values() if x.requires_grad]
            for counted in (False, True):
                with ExitStack() as stack:
                    profiler = stack.enter_context(profile(activities=[activity])) if counted else None
                    torch.autograd.grad(run(inputs).float().sum(), leaves)
                    if not self.rehearse:
                        torch.cuda.synchronize()
            assert profiler is not None
            events = profiler.key_averages()
            key = "self_cpu_time_total" if self.rehearse else "self_device_time_total"
            launches = sum(event.count for event in events if getattr(event, key) > 0)
            with (self.out / "profile.txt").open("a", encoding="utf-8") as stream:
                print(f"{case.op} {small.shape} {case.dtype}: {launches} launches", file=stream)
                print(events.table(sort_by=key, row_limit=14, max_name_column_width=48), file=stream)
            print(f"{case.op} {small.shape}: {launches} launches", flush=True)

    def choices(self, names: tuple[str, ...] | None = None) -> None:
        """Tile shapes, panel sizes and who multiplies, beside each other: rows of ``choices.csv``."""
        for case in GPU_FIRST[1:2] if self.rehearse else GPU_FIRST[:2]:
            for name, change in variants().items():
                if names is None or name in names:
                    with change():
                        answer = self.answer(case, "library" if name.startswith("library") else "triton")
                    time_ms = f"{answer['p50']:.4f}" if "p50" in answer else ""
                    row = {"choice": name, "op": case.op, "dtype": case.dtype,
                           "shape": self.sized(case).shape, "ms": time_ms,
                           "error": f"{answer['error']:.1e}" if "error" in answer else "",
                           "note": answer.get("failed", answer.get("skipped", ""))}  # fmt: skip
                    append_rows(self.out / "choices.csv", CHOICES, [row])
                    print(f"{case.op} {name}: {row['ms'] or row['note']}", flush=True)

    def winners(self) -> None:
        """The best choice of part 1 and its baseline, twice more."""
        path = self.out / "choices.csv"
        rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
        best = {}
        for row in sorted((row for row in rows if row["ms"]), key=lambda row: -float(row["ms"])):
            best[row["op"]] = row["choice"]
        for _ in range(1 if self.rehearse else 2):
            self.choices((*dict.fromkeys([*best.values(), next(iter(variants()))]),))


def variants() -> dict[str, Callable]:
    """What is compared; the first is what runs today."""
    from fastuda.kernels import (
        _aggregate_gradient,
        _aggregate_weights,
        _association_gradient,
        _panels,
        _search,
        _temperature,
    )

    tiled = (_aggregate_gradient, _aggregate_weights, _association_gradient, _panels, _search, _temperature)

    @contextmanager
    def changed(modules, name, value):
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(mock.patch.object(module, name, value))
            yield

    def tiles(m, n, k, warps, stages):
        shape = dict(BM=m, BN=n, BK=k, num_warps=warps, num_stages=stages)
        return lambda: changed(tiled, "tile_shape", lambda x: dict(shape))

    def panels(mib):
        return lambda: changed((_panels, _search, _temperature), "PANEL_BYTES", mib << 20)

    return {
        "tiles 128x128x64, 3 stages, panels of 32 MiB": lambda: changed((), "", None),
        "library, panels of 32 MiB": lambda: changed((), "", None),
        "library, panels of 64 MiB": panels(64),
        "library, panels of 16 MiB": panels(16),
        "tiles, panels of 64 MiB": panels(64),
        "tiles 128x128x64, 4 stages": tiles(128, 128, 64, 8, 4),
        "tiles 128x256x64, 3 stages": tiles(128, 256, 64, 8, 3),
        "tiles 64x256x64, 3 stages, 4 warps": tiles(64, 256, 64, 4, 3),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.gpu_check", __doc__ or "", EXAMPLES)
    p.add_argument(
        "out", type=cli.a_path, metavar="DIR", help="folder for the results, made where it is not there"
    )
    p.add_argument("--part", type=int, choices=tuple(PARTS), default=1, help="which part (default: 1)")
    p.add_argument(
        "--kit", type=cli.a_path, default=ROOT / "build" / "gpu-kit", metavar="DIR",
        help="what bench.gpu_kit left (default: build/gpu-kit)",
    )  # fmt: skip
    p.add_argument("--rehearse", action="store_true", help="every stage on the CPU, small, without its tests")
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
