"""Measure ops and providers, write a CSV, and generate the table of bench/README.md.

On a CPU every measurement runs in its own process, to measure its own peak memory. On a GPU the allocator
reports the peak of each measurement, so one process does them all, and another replaces it if it dies. The
machine's ceilings are measured first, and a case's floor just before its providers. A provider that fails,
runs out of memory or returns a wrong result gets no number.

On a GPU the most important sizes come first, and torch.compile, which takes long to compile, comes last. Rows
are written at once, so that they are kept when the budget expires.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench import table
from bench.case import Case
from bench.machine import check_device, machine, machine_flags, place_of
from bench.providers import PROVIDERS
from bench.registry import CASES, SWEEP
from bench.rows import append_rows, check_rows, say
from bench.server import Server, child
from fastuda import cli
from fastuda.errors import UserError, nearest

HERE = Path(__file__).resolve().parent
EXAMPLES = """\
  python -m bench.run                                     every op and provider
  python -m bench.run --op cycle_match --provider fastuda --provider reference --csv match.csv
  python -m bench.run --op spatial_aggregate --pixels 8464 --dtype bfloat16 --threads 2
  python -m bench.run --sweep && python -m bench.plot     time and memory against N
  python -m bench.run --device cuda --timeout 100 --budget 440

Rows are appended to an existing CSV."""


GPU_FIRST = [
    *(
        Case(op, "fwd+bwd", dtype, 8464, 2048)
        for dtype in ("bfloat16", "float32")
        for op in ("cycle_association_loss", "spatial_aggregate")
    ),
    *(Case(op, "fwd+bwd", "bfloat16", 32768, 256) for op in ("cycle_association_loss", "spatial_aggregate")),
    *(
        Case(op, "fwd+bwd", "float32", 8464, 19, "kl")
        for op in ("cycle_association_loss", "spatial_aggregate")
    ),
    *(
        Case(op, "fwd+bwd", "bfloat16", 8464, 2048, batch=4)
        for op in ("cycle_association_loss", "spatial_aggregate")
    ),
    Case("cycle_match", "fwd", "bfloat16", 8464, 2048),
    Case("spatial_aggregate", "fwd", "bfloat16", 16836, 2048),
    *(case for case in CASES if case.op not in ("cycle_association_loss", "spatial_aggregate")),
]
"""The first cases on a GPU: the training crop (and a batch of four), a full frame, the size of predictions,
the test image, then all other ops."""


def ceiling_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the rates that the machine reaches; returns them as rows."""
    answer = child(CASES[0], "ceilings", args)
    if "failed" in answer:
        say(f"the machine's ceilings: {answer['failed']}")
    rows = [
        {**row, **{key: round(row[key], 2) for key in ("p20", "p50", "p80")}, "provider": "torch", "mode": "",
         **place_of(args)}
        for row in answer.get("ceilings", [])
    ]  # fmt: skip
    for row in rows:
        say(f"{row['op']} {row['dtype']} {row['shape']}: {row['note']}")
    return rows


def measure(
    case: Case,
    providers: list[str],
    args: argparse.Namespace,
    append: Callable[[list[dict[str, object]]], None],
    times: dict[Case, tuple[float, float]],
    bar: tqdm,
) -> None:
    """Measure the floor and some providers of a case. ``times`` caches floors and the reference's times."""
    common = {"op": case.op, "mode": case.mode, "dtype": case.dtype, "shape": case.shape}
    title = " ".join(common.values())
    floor, reference = times.get(case, (0.0, 0.0))
    if not floor:
        answer = child(case, "floor", args)
        floor = answer.get("floor", 0.0)
        if not floor:
            say(f"{title}: no floor, {answer.get('failed')}")
    place = place_of(args)
    digits = 4 if args.device == "cuda" else 2
    for provider in providers:
        if time.monotonic() > args.deadline:
            break
        name = f"{title} {provider}"
        answer = child(case, provider, args)
        bar.update()
        if "skipped" in answer:
            continue
        if "failed" in answer:
            say(f"{name}: {answer['failed']}")
            append([{**common, "provider": provider, "note": answer["failed"], **place}])
            continue
        if provider == "reference":
            reference = answer["p50"]
        row = {**common, "provider": provider, **{k: round(answer[k], digits) for k in ("p20", "p50", "p80")},
               "extra_mib": round(answer["extra_mib"], 1), "floor_ms": round(floor, digits) if floor else "",
               "to_floor": round(answer["p50"] / floor, 2) if floor else "",
               "to_reference": round(answer["p50"] / reference, 3) if reference else "",
               "error": f"{answer['error']:.1e}", "note": "", **place}  # fmt: skip
        append([row])
        say(
            f"{name}: {row['p50']} ms, {row['to_floor']} of floor, {row['to_reference']} of reference,"
            f" {row['extra_mib']} MiB"
        )
    times[case] = floor, reference


def chosen(args: argparse.Namespace) -> list[Case]:
    """The selected cases, in the order of measurement."""
    cases = SWEEP if args.sweep else CASES
    if args.device == "cuda" and not args.sweep:
        cases = list(dict.fromkeys([*GPU_FIRST, *CASES]))
    return [
        case
        for case in cases
        if (not args.op or case.op in args.op)
        and all(
            not wanted or wanted == getattr(case, key)
            for key, wanted in (("mode", args.mode), ("dtype", args.dtype), ("pixels", args.pixels))
        )
    ]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.run", __doc__ or "", EXAMPLES)
    p.add_argument("--op", action="append", metavar="OP", help="only this op (repeatable)")
    p.add_argument(
        "--mode", choices=("fwd", "fwd+bwd"), help="only fwd cases or only fwd+bwd cases (default: both)"
    )
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="only inputs of this type (default: both)"
    )
    p.add_argument(
        "--pixels", type=int, metavar="N",
        help="only this size: pixels of a feature map (8464 for a crop of 730), or the width of an image",
    )  # fmt: skip
    p.add_argument(
        "--provider", action="append", choices=list(PROVIDERS), metavar="NAME",
        help=f"only this provider (repeatable): {', '.join(PROVIDERS)}",
    )  # fmt: skip
    p.add_argument(
        "--sweep", action="store_true", help="measure the sizes of the plot instead of the table's"
    )
    machine_flags(p, "all of them")
    p.add_argument(
        "--repeats", type=cli.number(int, 1), default=5, metavar="N",
        help="timed runs, at least this many on a GPU; the median is reported (default: 5)",
    )  # fmt: skip
    p.add_argument(
        "--timeout",
        type=cli.number(int, 1),
        default=900,
        metavar="S",
        help="seconds for one measurement (default: 900)",
    )
    p.add_argument(
        "--csv", type=cli.a_path, metavar="FILE",
        help="CSV to append the rows to (default: bench/results/<machine>_<date>.csv)",
    )  # fmt: skip
    return p


def main() -> int:
    """Parse the command line, measure, write."""
    args = build_parser().parse_args()
    ops = dict.fromkeys(case.op for case in (*CASES, *SWEEP))
    for op in args.op or ():
        if op not in ops:
            raise UserError(f"the bench has no op {op!r}{nearest(op, ops)}")
    check_device(args.device)
    cases = chosen(args)
    if not cases:
        sizes = sorted({case.pixels for case in (SWEEP if args.sweep else CASES)})
        raise UserError(
            "no case matches --op, --mode, --dtype and --pixels together; there are sizes of "
            + ", ".join(map(str, sizes))
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads or torch.get_num_threads()))
    args.deadline = time.monotonic() + args.budget
    args.server = Server()
    name = re.sub("[^a-z0-9]+", "-", machine(args.device).lower()).strip("-")
    path = args.csv or HERE / "results" / f"{name}_{datetime.date.today().isoformat()}.csv"
    check_rows(path, table.COLUMNS)
    append = partial(append_rows, path, table.COLUMNS)
    # torch.compile takes most of a GPU's time, so every case is measured without it first
    names = sorted(args.provider or PROVIDERS, key=lambda name: name != "reference")
    late = [name for name in names if name == "compile" and args.device == "cuda"]
    times: dict[Case, tuple[float, float]] = {}
    try:
        # the bar is shown only on a terminal; elsewhere the printed lines show the progress
        with tqdm(total=len(cases) * len(names), unit="measurement", disable=None) as bar:
            if not (args.op or args.sweep or args.provider):
                append(ceiling_rows(args))
            for providers in ([name for name in names if name not in late], late):
                for number, case in enumerate(cases):
                    if providers and time.monotonic() > args.deadline:
                        say(f"time is over: {len(cases) - number} cases left without {', '.join(providers)}")
                        break
                    measure(case, providers, args, append, times, bar)
    finally:
        args.server.close()
    table.write()
    print(f"wrote {path} and {HERE / 'README.md'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
