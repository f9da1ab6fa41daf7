"""The stages of :mod:`bench.gpu_check` that are functions; they run on the GPU, or at a small size on the
CPU."""

from __future__ import annotations

import csv
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from bench import end_to_end, measure, published, table, turns
from bench.case import Case
from bench.machine import machine
from bench.registry import CASES
from bench.rows import append_rows
from bench.run import GPU_FIRST
from bench.timing import ceilings
from fastuda.errors import UserError

CHOICES = ("choice", "op", "dtype", "shape", "ms", "error", "note")


class Work:
    """The stages that are functions, on the GPU or at a small size on the CPU. ``after`` is the folder with
    the results of part 1."""

    def __init__(self, out: Path, rehearse: bool, after: Path, commit: str) -> None:
        self.out, self.device = out, "cpu" if rehearse else "cuda"
        self.rehearse, self.after, self.commit = rehearse, after, commit

    def place(self) -> dict[str, object]:
        """The columns that say where and when a row was measured."""
        return {"machine": machine(self.device), "device": self.device, "torch": torch.__version__,
                "commit": self.commit, "date": time.strftime("%Y-%m-%d")}  # fmt: skip

    def sized(self, case: Case) -> Case:
        """The case; in a rehearsal a small one."""
        if not self.rehearse:
            return case
        return replace(case, pixels=64, channels=min(case.channels, 512), batch=1)

    def answer(self, case: Case, provider: str) -> dict:
        """The result of :func:`bench.measure.answer` for one measurement."""
        job = {"case": vars(self.sized(case)), "provider": provider, "device": self.device, "repeats": 5}
        if self.rehearse:
            with mock.patch.multiple(measure, CHECK_PIXELS=32, settle=lambda step: None):
                return measure.answer(job | {"repeats": 1})
        return measure.answer(job)

    def measured(self, cases: list[Case], providers: tuple[str, ...]) -> None:
        """Measure cases and append their rows to ``ops.csv``."""
        place = self.place()
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
        """Compare the library products that the kernels use with float64: half precision into float32, added
        to existing values, with transposed and odd strides.

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
        """The ops with similarities at the size of a training crop, and their alternatives."""
        for row in ceilings(self.device, 1 if self.rehearse else 3):
            row |= {key: f"{row[key]:.4f}" for key in ("p20", "p50", "p80")}
            row |= {"provider": "torch", "mode": "", **self.place()}
            append_rows(self.out / "ops.csv", table.COLUMNS, [row])
            print(row["op"], row["dtype"], row["note"], flush=True)
        self.measured(GPU_FIRST[:2], ("fastuda", "graph", "triton", "reference", "authors", "sdpa"))
        kl = [case for case in GPU_FIRST if case.similarity == "kl"]
        self.measured(kl, ("fastuda", "graph", "reference", "authors"))
        self.measured(
            [case for case in GPU_FIRST if case.op == "cycle_match"], ("fastuda", "triton", "reference")
        )

    def others(self) -> None:
        """The main ops in float32, the full frame, and all other ops."""
        self.measured(GPU_FIRST[2:6], ("fastuda", "triton", "reference"))
        cases = [case for case in CASES if case.moved and case.channels < 4096 and case.mode == "fwd+bwd"]
        cases += [case for case in CASES if case.op in ("upsample_confusion", "class_statistics")]
        # the interpreter takes long for these kernels, and the tests run them in it anyway
        second = () if self.rehearse else ("graph", "triton")
        self.measured(cases, ("fastuda", *second, "reference"))

    def step(self) -> None:
        """A training step of PLCA on the fused ops and as published: seconds first, then memory, losses and
        the parts' shares, then the row of bench.end_to_end in ``steps.csv``. All sides run in this process,
        because every process would import torch and start the GPU again."""
        size = {"backbone": "resnet101", "crop": [730, 730], "batch": 4, "dtype": "bfloat16", "workers": 8}
        if self.rehearse:
            size = {"backbone": "small", "crop": [64, 96], "batch": 1, "dtype": "float32", "workers": 0}
        sides = list(end_to_end.SIDES)

        def side(job: dict, name: str, timeout: float = 0) -> dict:
            if name == end_to_end.PLAIN:
                return {"failed": "left out here"}
            with ExitStack() as stack:
                for of, attribute, _ in turns.changes(name) if name in published.SIDES else ():
                    stack.enter_context(mock.patch.object(of, attribute, getattr(of, attribute)))
                answer = end_to_end.work(job | {"side": name, "sides": sides})
            gc.collect()
            for key, value in answer.items():
                print(f"plca {job['dtype']} {name} {key}: {value}", flush=True)
            return answer

        with tempfile.TemporaryDirectory() as root:
            job = {"method": "plca", "steps": 1 if self.rehearse else 3, "device": self.device, "threads": 0,
                   "settings": {}, "root": root, **size}  # fmt: skip
            times = side(job, "turns")
            for name in sides:
                print(f"plca {name}: {statistics.median(times[name]):.3f} s a step", flush=True)

            def known(job: dict, name: str, timeout: float = 0) -> dict:
                return times if name == "turns" else side(job, name)

            with mock.patch.object(end_to_end, "side", known):
                row = end_to_end.compare(job) | {"commit": self.commit}
        append_rows(self.out / "steps.csv", end_to_end.COLUMNS, [row])
        print(end_to_end.line_of(row), flush=True)

    def profiles(self) -> None:
        """Write the kernels of the ops with similarities, sorted by time, to ``profile.txt``."""
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
        """Compare tile shapes, panel sizes, and tiles with the library: rows of ``choices.csv``."""
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
        """Measure the best choice of part 1 and its baseline twice more."""
        path = self.after / "choices.csv"
        rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
        best = {}
        for row in sorted((row for row in rows if row["ms"]), key=lambda row: -float(row["ms"])):
            best[row["op"]] = row["choice"]
        for _ in range(1 if self.rehearse else 2):
            self.choices((*dict.fromkeys([*best.values(), next(iter(variants()))]),))


def variants() -> dict[str, Callable]:
    """The compared variants; the first is the current one."""
    from fastuda.kernels import (
        _aggregate_divergence,
        _aggregate_symmetric,
        _aggregate_weights,
        _association_gradient,
        _moments,
        _panels,
        _search,
        _temperature,
    )

    tiled = (
        _aggregate_divergence,
        _aggregate_symmetric,
        _aggregate_weights,
        _association_gradient,
        _moments,
        _panels,
        _search,
    )

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
        return lambda: changed((_panels, _search, _moments, _temperature), "PANEL_BYTES", mib << 20)

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
