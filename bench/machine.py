"""The machine of a bench: its name, and the flags that select device and time."""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import subprocess
from pathlib import Path

import torch

from fastuda import cli
from fastuda.errors import UserError


def machine_flags(p: argparse.ArgumentParser, of_all: str) -> None:
    """Add the flags for device, threads and time; ``of_all`` names the items that share the time."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    p.add_argument(
        "--threads",
        type=cli.number(int, 0),
        default=0,
        metavar="N",
        help="torch threads (default: 0, torch's own number)",
    )
    p.add_argument(
        "--budget", type=cli.number(float, 0), default=math.inf, metavar="S",
        help=f"seconds for {of_all}; the rest is not measured (default: no limit)",
    )  # fmt: skip


def check_device(device: str) -> None:
    """Check that the device exists.

    Raises:
        UserError: torch finds no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} finds no CUDA device here")


def machine(device: str) -> str:
    """A short name of the processor or card."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = (line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    of = {key.strip(): value.strip() for key, value in lines}
    if "model name" in of:
        # the processor's name in a virtual machine often lacks its model number
        model = "".join(f"{key.split()[-1]} {of[key]}, " for key in ("cpu family", "model") if key in of)
        units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
        flags = of.get("flags", "").split()
        unit = next((name for flag, name in units.items() if flag in flags), "no AVX2")
        return f"{of['model name']} ({model}{unit})"
    return platform.processor() or platform.machine()


def commit() -> str:
    """The short commit of the checkout; empty if unknown."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def place_of(args: argparse.Namespace) -> dict[str, object]:
    """The columns that say where and when a row was measured."""
    threads = "" if args.device == "cuda" else f" x{args.threads or torch.get_num_threads()}"
    return {"machine": f"{machine(args.device)}{threads}",
            "device": args.device, "torch": torch.__version__, "commit": commit(),
            "date": datetime.date.today().isoformat()}  # fmt: skip
