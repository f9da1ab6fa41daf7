"""Compare finished runs: mean and spread of the scores over the seeds of each method."""

from __future__ import annotations

import argparse
import json
import math
import sys

from fastuda.cli import a_path, parser, run
from fastuda.errors import UserError
from fastuda.inference.scores import PROTOCOLS
from fastuda.report.comparison import markdown, read_groups, write

EXAMPLES = """\
  python -m fastuda.compare runs/*
  python -m fastuda.compare runs/* --out comparison        CSV, Markdown, HTML and a plot
  python -m fastuda.compare runs/* --json
  python -m fastuda.compare runs/* --protocol confusion19

Runs on the same pair of domains are compared by one protocol (see fastuda evaluate --help): by their own, or
by ignore if their protocols differ. The title names the protocol if it makes a difference."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.compare", __doc__ or "", EXAMPLES)
    p.add_argument("runs", type=a_path, nargs="+", help="run folders, or folders that contain them")
    p.add_argument("--out", type=a_path, help="write comparison.csv, .md, .html and .svg into this folder")
    p.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="treatment of target classes that the runs lack (default: the runs' own)",
    )
    p.add_argument("--json", action="store_true", help="print means, spreads and values as JSON")
    p.add_argument("--quiet", action="store_true", help="print only errors (and --json)")
    return p


def main() -> int:
    """Parse, read, print, write."""
    args = build_parser().parse_args()
    missing = [str(path) for path in args.runs if not path.exists()]
    if missing:
        raise UserError(f"no folder {', '.join(missing)}")
    folders = [path for path in args.runs if path.is_dir()]  # runs/* also matches files
    if not folders:
        raise UserError(f"no folder among {', '.join(map(str, args.runs))}")
    groups = read_groups(folders, args.protocol)
    if args.out:
        write(groups, args.out)
        if not args.quiet:
            print(f"written to {args.out}", file=sys.stderr)
    if args.json:
        rows = [
            {"domains": g.domains, "method": g.method, "seeds": g.seeds,
             "scores": {n: {"mean": _plain(g.mean(n)), "spread": _plain(g.spread(n)),
                            "values": [_plain(v) for v in g.scores[n]]} for n in g.scores}}
            for g in groups
        ]  # fmt: skip
        print(json.dumps(rows, indent=1))
    elif not args.quiet:
        print(markdown(groups), end="")
    return 0


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


if __name__ == "__main__":
    run(main)
