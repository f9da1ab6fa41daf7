"""``python -m bench.run``: measure ops and providers, write a CSV, and generate the table of the README.

On a CPU every measurement runs in its own process, so that its peak memory is its own; a GPU's allocator
tells the peak of one measurement, so that one process takes them all. The ceilings of the machine are
measured first, the floor of a case right before its providers. A provider whose result is wrong gets no
number.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import measure, table
from bench.providers import PROVIDERS
from bench.registry import CASES, SWEEP, Case

HERE = Path(__file__).resolve().parent


def child(case: Case, provider: str, args: argparse.Namespace) -> dict:
    """The answer of one measurement."""
    job = {"case": asdict(case), "provider": provider, "device": args.device, "repeats": args.repeats,
           "threads": args.threads}  # fmt: skip
    if args.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return measure.answer(job)
    command = [sys.executable, "-m", "bench.measure", json.dumps(job)]
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {args.timeout} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    return {"failed": f"ended with {done.returncode} (out of memory?)"}


def machine(device: str) -> str:
    """A short name of the processor or card."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for line in told.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip() + (" with AMX" if " amx_bf16" in told else "")
    return platform.processor() or platform.machine()


def commit() -> str:
    """The short commit of the checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def place_of(args: argparse.Namespace) -> dict[str, object]:
    """Where and when a row was measured."""
    return {"machine": f"{machine(args.device)} x{args.threads or torch.get_num_threads()}",
            "device": args.device, "torch": torch.__version__, "commit": commit(),
            "date": datetime.date.today().isoformat()}  # fmt: skip


def ceiling_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """The rates that the machine reaches, as rows."""
    rows = [
        {**row, **{key: round(row[key], 2) for key in ("p20", "p50", "p80")}, "provider": "torch", "mode": "",
         **place_of(args)}
        for row in child(CASES[0], "ceilings", args).get("ceilings", [])
    ]  # fmt: skip
    for row in rows:
        print(f"{row['op']} {row['dtype']} {row['shape']}: {row['note']}", flush=True)
    return rows


def rows_of(case: Case, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the floor and every provider of a case."""
    floor = child(case, "floor", args).get("floor", 0.0)
    common = {"op": case.op, "mode": case.mode, "dtype": case.dtype, "shape": case.shape}
    place = place_of(args)
    rows: list[dict[str, object]] = []
    reference = 0.0
    for provider in sorted(args.provider or PROVIDERS, key=lambda name: name != "reference"):
        answer = child(case, provider, args)
        if "skipped" in answer:
            continue
        if "failed" in answer:
            print(
                f"{case.op} {case.mode} {case.dtype} {case.shape} {provider}: {answer['failed']}", flush=True
            )
            rows.append({**common, "provider": provider, "note": answer["failed"], **place})
            continue
        if provider == "reference":
            reference = answer["p50"]
        row = {**common, "provider": provider, **{k: round(answer[k], 2) for k in ("p20", "p50", "p80")},
               "extra_mib": round(answer["extra_mib"], 1), "floor_ms": round(floor, 2),
               "to_floor": round(answer["p50"] / floor, 2) if floor else "",
               "to_reference": round(answer["p50"] / reference, 3) if reference else "",
               "error": f"{answer['error']:.1e}", "note": "", **place}  # fmt: skip
        rows.append(row)
        print(
            f"{case.op} {case.mode} {case.dtype} {case.shape} {provider}: {row['p50']} ms,"
            f" {row['to_floor']} of floor, {row['to_reference']} of reference, {row['extra_mib']} MiB",
            flush=True,
        )
    return rows


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--op", action="append", help="only this op (repeatable)")
    parser.add_argument("--mode", choices=("fwd", "fwd+bwd"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--provider", action="append", choices=list(PROVIDERS))
    parser.add_argument("--sweep", action="store_true", help="the sizes of the plot instead of the table's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: as they are)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one measurement")
    parser.add_argument(
        "--csv", type=Path, help="where to append (default: bench/results/<machine>_<date>.csv)"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads or torch.get_num_threads()))
    name = "".join(c if c.isalnum() else "-" for c in machine(args.device).lower()).strip("-")
    path = args.csv or HERE / "results" / f"{name}_{datetime.date.today().isoformat()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)

    def append(rows: list[dict[str, object]]) -> None:
        fresh = not path.exists()
        with path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, table.COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)

    if not (args.op or args.sweep or args.provider):
        append(ceiling_rows(args))
    for case in SWEEP if args.sweep else CASES:
        if args.op and case.op not in args.op:
            continue
        if any(wanted and wanted != getattr(case, key) for key, wanted in
               (("mode", args.mode), ("dtype", args.dtype), ("pixels", args.pixels))):  # fmt: skip
            continue
        append(rows_of(case, args))
    table.write()
    print(f"wrote {path} and {HERE / 'README.md'}")


if __name__ == "__main__":
    main()
