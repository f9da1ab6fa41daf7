"""Write a finished run as one file: ONNX or torch.export, which run without fastuda, or safetensors."""

from __future__ import annotations

import argparse
import json

from fastuda.cli import a_path, number, parser, run
from fastuda.errors import UserError

EXAMPLES = """\
  python -m fastuda.export runs/plca --out plca.onnx
  python -m fastuda.export runs/plca --format torch --out plca.pt2
  python -m fastuda.export runs/hrda --out hrda.onnx --size 1024 2048    # a run with model.hrda needs a size
  python -m fastuda.export runs/plca --out plca.safetensors    # fastuda.predict accepts it instead of a run
  python -m fastuda.export runs/plca --out plca.onnx method.test_aggregation=false

Files in the formats onnx and torch map images [B, 3, H, W] (float32 RGB in 0..255, any size) to labels
[B, H, W] and probabilities [B, K, H, W]. They include normalisation, aggregation and upsampling. The outputs
are compared with those of the run before the file is written. In these files the aggregation of plca stores a
matrix of (H W / 64)^2 numbers. If that is too large, leave the aggregation out, as in the last example.
examples/segment_with_onnx.py uses such a file."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.export", __doc__ or "", EXAMPLES)
    p.add_argument("run", type=a_path, help="run folder with config.yaml and model.safetensors")
    p.add_argument(
        "--format", choices=["onnx", "torch", "safetensors"], help="format (default: by the suffix of --out)"
    )
    p.add_argument("--out", type=a_path, required=True, help="file to write")
    p.add_argument(
        "--size", nargs=2, type=number(int, 1), metavar=("H", "W"),
        help="size of the images, for onnx and torch (default: any; model.hrda needs one)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print what was written as JSON")
    p.add_argument("--quiet", action="store_true", help="print only errors")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings of method.*")
    return p


def main() -> int:
    """Parse, load, export, compare."""
    args = build_parser().parse_intermixed_args()

    import torch

    from fastuda.inference.exporting import SUFFIXES, about, export_onnx, export_safetensors, export_torch
    from fastuda.inference.saved import load_run, override
    from fastuda.system.log import setup_logging

    setup_logging(quiet=True)
    kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
    kind = args.format or kinds.get(args.out.suffix)
    if kind is None:
        raise UserError(f"{args.out} ends in none of {', '.join(kinds)}; choose one with --format")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; name the file to write")
    if not args.out.parent.is_dir():
        raise UserError(f"no folder {args.out.parent} for {args.out.name}")
    config, method, classes = load_run(args.run, torch.device("cpu"))
    config = override(config, method, args.overrides)
    worst = None
    if kind == "safetensors":
        if args.size:
            raise UserError("--size is for onnx and torch: a safetensors file takes images of any size")
        export_safetensors(args.out, config, method, classes)
    else:
        write = export_onnx if kind == "onnx" else export_torch
        fixed = tuple(args.size) if args.size else None
        worst = write(args.out, method, about(config, classes, fixed), fixed)
    size = args.out.stat().st_size
    if args.json:
        print(
            json.dumps({"out": str(args.out), "format": kind, "bytes": size, "difference": worst}, indent=1)
        )
    elif not args.quiet:
        compared = "" if worst is None else f"; probabilities within {worst:.1g} of the run's"
        print(f"{args.out}: {kind}, {size / 2**20:.1f} MiB{compared}")
        if config.data.eval_size and not args.size:
            print(
                "the run was evaluated on images of {} x {} (data.eval_size)".format(*config.data.eval_size)
            )
    return 0


if __name__ == "__main__":
    run(main)
