"""Write report.html of a finished run into its folder: a single file that needs no network."""

from __future__ import annotations

import argparse

from fastuda.cli import a_path, parser, run

EXAMPLES = """\
  python -m fastuda.report runs/plca       # writes runs/plca/report.html again

Training writes this page at its end, unless log.report=false."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.report", __doc__ or "", EXAMPLES)
    p.add_argument("runs", type=a_path, nargs="+", metavar="RUN", help="folder of a finished run")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--quiet", action="store_true", help="print only errors")
    return p


def main() -> int:
    """Parse, write."""
    args = build_parser().parse_args()
    from fastuda.report.page import write_report
    from fastuda.system.log import setup_logging

    setup_logging(quiet=True)
    for folder in args.runs:
        path = write_report(folder, args.device)
        if not args.quiet:
            print(path)
    return 0


if __name__ == "__main__":
    run(main)
