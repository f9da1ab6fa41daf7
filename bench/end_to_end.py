"""Time training steps on the fused ops against the published formulations, and against plain torch networks.

Each side runs the trainer from the same seed on the same scenes: once with ``fastuda.ops``, once with the
formulations of the authors' code (bench/published.py), and once with the losses of ``fastuda.ops`` on a
network of torch's own layers. The losses of all sides over the first steps must agree; otherwise no time is
reported. Rounding to bfloat16 changes which pixels of an untrained network match, and so can change whole
losses: sides that differ in bfloat16 must agree in float32. Times are measured by turns in one process: a
step of each side, then again. Memory is the peak above what remains between steps, in a process for each
side. The shares of the step's parts come from ``python -m fastuda.profile`` over one more step there. If
the ops' share of a published step is s, faster ops can speed up that step by at most 1 / (1 - s). The floor
of the networks is the time of their products at the machine's rate of large products.

Each method's row is written at once, without the sides that failed, for example by running out of memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench import beside, published, table, turns
from bench.jobs import HERE, Failed, config_of, losses, side, trainer, watch_losses
from bench.machine import check_device, commit, machine, machine_flags
from bench.measure import peak, start_peak
from bench.rows import append_rows, check_rows, say
from bench.timing import networks_floor
from fastuda import cli
from fastuda.engine.profiling import PARTS, profile_step
from fastuda.errors import UserError
from fastuda.methods import METHODS
from fastuda.system.log import setup_logging
from fastuda.system.memory import keep_freed_memory
from fastuda.system.precision import support
from fastuda.system.settings import parse_overrides

EXAMPLES = """\
  python -m bench.end_to_end --method plca --crop 736 736 --steps 1
  python -m bench.end_to_end --method sepico --set variant=bank --dtype float32
  python -m bench.end_to_end --csv bench/results/end_to_end.csv    # every method, into the README
  python -m bench.end_to_end --method self_training --set mask_ratio=0.7 --beside mask_ratio=0"""
SIDES = ("fused", "published")
PLAIN = "plain"
"""The third side: a network of torch's own layers with the losses of ``fastuda.ops``."""
COLUMNS = (
    *("method", "backbone", "crop", "batch", "dtype", "fused_s", "published_s", "ratio", "fused_mib"),
    *("published_mib", "loss_difference"),
    *(f"{side}_{part}" for side in SIDES for part in PARTS),
    *("largest_op", "machine", "torch", "commit", "date"),
    *("plain_s", "plain_ratio", "plain_mib", "floor_s", "to_floor"),
)
COMPARED = {"float32": 2, "bfloat16": 4}
"""Number of steps whose losses are compared. Rounding accumulates and changes matches, and so the losses."""
ORDER = ("plca", "asanet", "fada", "sepico", "weakseg", "self_training", "source_only")
"""The methods to measure first."""
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
"""Tolerance of a loss. Rounding decides some matches of an untrained network, and one match of 768 is 2e-3 of
PLCA's loss."""


def work(job: dict) -> dict[str, object]:
    """Measure one side: losses of each step, peak memory above the network's, and the parts' shares; or the
    seconds of a step of all sides."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    setup_logging(quiet=True)
    device = job["device"]
    if "beside" in job:
        return beside.measure(job)
    terms = []
    with tempfile.TemporaryDirectory() as folder:
        if job["side"] == "turns":
            return turns.seconds(job, Path(folder))
        published.SIDES[job["side"]](setattr)
        run = trainer(job, Path(folder))
        run.method.train()
        names = watch_losses(run)
        before = highest = 0.0
        for step in range(max(COMPARED[job["dtype"]], 3)):
            if step == 1:  # the first step includes compilation and caches
                before = start_peak(device)
            elif step == 2:
                highest = peak(device)
                if device == "cpu":  # as the trainer does, for the shares
                    keep_freed_memory()
            run.step()
            terms.append(losses(run, names))
        profile = profile_step(run, warm_up=0, steps=1)
        floor = networks_floor(run.step, job["dtype"], device) if job["side"] == PLAIN else None
        run.loader.close()
    parts = {"share": profile.share, "ops": profile.ops, "floor": floor}
    return {"losses": terms, "mib": highest - before} | parts


def difference(fused: list[dict[str, float]], truth: list[dict[str, float]]) -> float:
    """Largest relative difference of any loss term at any step."""
    return max(
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-2)
        for a, b in zip(fused, truth, strict=True)
        for name in b
    )


def agreement(job: dict, name: str, sides: dict[str, dict], timeout: float = math.inf) -> str:
    """Largest relative difference of the losses of the side ``name`` from the fused ones, as text. If
    bfloat16 differs by more than its tolerance, both sides run again in float32.

    Raises:
        Failed: the losses differ in float32 as well, or its runs failed.
    """
    gap = difference(*(sides[of]["losses"][: COMPARED[job["dtype"]]] for of in ("fused", name)))
    if gap <= TOLERANCE[job["dtype"]]:
        return f"{gap:.1e}"
    what = f"{job['method']}, {name}: the losses differ by {gap:.2g} in {job['dtype']}"
    if job["dtype"] == "float32":
        raise Failed(f"{what}; no time is given for that")
    single = {**job, "dtype": "float32", "steps": 1}
    fused, other = (side(single, of, timeout) for of in ("fused", name))
    if failed := fused.get("failed") or other.get("failed"):
        raise Failed(f"{what}, and float32, which would tell, {failed}")
    sides = {"fused": fused, name: other}
    return f"{agreement(single, name, sides)} (float32)"


def compare(job: dict, timeout: float = math.inf) -> dict[str, object]:
    """Measure all sides within ``timeout`` seconds, as one row.

    Raises:
        Failed: the fused side failed, or its losses differ from the published ones.
    """
    end = time.monotonic() + timeout
    sides = {name: side(job, name, max(end - time.monotonic(), 1.0)) for name in published.SIDES}
    fused, truth, plain = sides.values()
    if "failed" in fused:
        raise Failed(f"{job['method']}, fused, {fused['failed']}")
    ran = [name for name, result in sides.items() if "failed" not in result]
    times = side(job | {"sides": ran}, "turns", max(end - time.monotonic(), 1.0))
    if "failed" in times:
        raise Failed(f"{job['method']}, {' and '.join(ran)} by turns, {times['failed']}")
    seconds = statistics.median(times["fused"])
    row: dict[str, object] = {
        "method": job["method"], "backbone": job["backbone"], "crop": "x".join(map(str, job["crop"])),
        "batch": job["batch"], "dtype": job["dtype"], "fused_s": f"{seconds:.3f}",
        "fused_mib": f"{fused['mib']:.0f}",
    }  # fmt: skip
    if "failed" in truth:
        say(f"{job['method']}, published, {truth['failed']}")
        truth["share"] = dict.fromkeys(PARTS, math.nan)
        row |= dict.fromkeys(("published_s", "ratio", "published_mib", "loss_difference", "largest_op"), "")
    else:
        gap = agreement(job, "published", sides, max(end - time.monotonic(), 1.0))
        truth_s = statistics.median(times["published"])
        row |= {"published_s": f"{truth_s:.3f}", "ratio": f"{truth_s / seconds:.2f}",
                "published_mib": f"{truth['mib']:.0f}", "loss_difference": gap,
                "largest_op": max(truth["ops"], key=truth["ops"].get, default="")}  # fmt: skip
    row |= dict.fromkeys(COLUMNS[-5:], "")
    try:
        if "failed" in plain:
            raise Failed(f"{job['method']}, plain torch, {plain['failed']}")
        agreement(job, PLAIN, sides, max(end - time.monotonic(), 1.0))
    except Failed as reason:
        say(str(reason))
    else:
        plain_s = statistics.median(times[PLAIN])
        networks_s = seconds * (fused["share"]["backbone"] + fused["share"]["heads"])
        row |= {"plain_s": f"{plain_s:.3f}", "plain_ratio": f"{plain_s / seconds:.2f}",
                "plain_mib": f"{plain['mib']:.0f}", "floor_s": f"{plain['floor']:.3f}",
                "to_floor": f"{networks_s / plain['floor']:.2f}"}  # fmt: skip
    for name, result in zip(SIDES, (fused, truth), strict=True):
        row |= {f"{name}_{part}": f"{result['share'][part]:.3f}" for part in PARTS}
    threads = "" if job["device"] == "cuda" else f" x{job['threads'] or torch.get_num_threads()}"
    return row | {
        "machine": f"{machine(job['device'])}{threads}", "torch": torch.__version__,
        "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def line_of(row: dict[str, object]) -> str:
    """A row as one line of text."""
    shares = ", ".join(f"{part} {100 * float(str(row[f'fused_{part}'])):.0f}%" for part in PARTS)
    text = f"{row['method']}: {1 / float(str(row['fused_s'])):.2f} steps/s"
    if row["ratio"]:
        text += f" against {1 / float(str(row['published_s'])):.2f} ({row['ratio']} x)"
    if row["plain_ratio"]:
        text += f", {row['plain_ratio']} x plain torch"
    text += f", {row['fused_mib']} MiB"
    if row["ratio"]:
        text += f" against {row['published_mib']} MiB, losses within {row['loss_difference']}"
    return f"{text}; {shares}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.end_to_end", __doc__ or "", EXAMPLES)
    p.add_argument("--method", action="append", metavar="NAME", help="repeatable (default: every method)")
    p.add_argument("--backbone", default="resnet18", help="as for fastuda.train (default: resnet18)")
    p.add_argument(
        "--crop", nargs=2, type=int, default=(512, 512), metavar=("H", "W"),
        help="size of the crops in pixels (default: 512 512)",
    )  # fmt: skip
    p.add_argument(
        "--batch-size",
        type=cli.number(int, 1),
        default=1,
        metavar="N",
        help="number of source and of target images (default: 1)",
    )
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="bfloat16 by autocast, or float32 throughout (default: bfloat16 if it is faster)",
    )  # fmt: skip
    p.add_argument(
        "--steps", type=cli.number(int, 1), default=3, metavar="N",
        help="timed steps of each side after an untimed one (default: 3)",
    )  # fmt: skip
    machine_flags(p, "all methods")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the methods, e.g. contrast=false, or of the sections data and model, e.g."
        " model.hrda=[128,128] (repeatable)",
    )  # fmt: skip
    p.add_argument(
        "--beside", action="append", default=[], metavar="KEY=VALUE",
        help="time steps with --set and steps with these settings instead, alternately in one process, and"
        " report only the ratio (repeatable)",
    )  # fmt: skip
    p.add_argument(
        "--workers",
        type=cli.number(int, 0),
        default=0,
        metavar="N",
        help="loader processes of each side (default: 0)",
    )
    p.add_argument("--csv", type=cli.a_path, metavar="FILE", help="append the rows to this CSV")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Parse the command line, measure, print and write."""
    args = build_parser().parse_args()
    if args.worker:
        print("RESULT " + json.dumps(work(json.loads(args.worker))))
        return 0
    check_device(args.device)
    device = torch.device(args.device)
    bf16 = support("bf16", device.type, device.index)
    dtype = args.dtype or ("bfloat16" if bf16.pays else "float32")
    every = sorted(METHODS, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    jobs = [
        {"method": name, "backbone": args.backbone, "crop": list(args.crop), "batch": args.batch_size,
         "dtype": dtype, "steps": args.steps, "device": args.device, "threads": args.threads,
         "settings": parse_overrides(args.set), "workers": args.workers}
        for name in args.method or every
    ]  # fmt: skip
    other = parse_overrides(args.beside)
    columns, measure, line = COLUMNS, compare, line_of
    if other:
        columns, measure, line = beside.COLUMNS, beside.cost, beside.line_of
    for job in jobs:  # check all before the first measurement
        config_of(job, Path())
        if other:
            job["beside"] = other
            config_of({**job, "settings": {**job["settings"], **other}}, Path())
    if args.csv:
        check_rows(args.csv, columns)
    if args.dtype is None:
        say(f"{dtype}: {bf16.reason}")
    deadline = time.monotonic() + args.budget
    failed = []
    with tempfile.TemporaryDirectory() as root, tqdm(jobs, unit="method", disable=None) as bar:
        for job in bar:
            left = deadline - time.monotonic()
            if left <= 0:
                failed.append(f"{job['method']}: no time was left")
                continue
            try:
                row = measure(job | {"root": root}, left)
            except Failed as reason:
                failed.append(str(reason))
                say(str(reason))
                continue
            say(line(row))
            if args.csv:
                append_rows(args.csv, columns, [row])
    if args.csv and args.csv.resolve().parent == HERE / "results":
        table.write()
    if failed:
        raise UserError("\n".join(["there is no row for", *failed]))
    return 0


if __name__ == "__main__":
    cli.run(main)
