"""Print versions, devices, and which backends of each op can run here, with the reasons why others cannot."""

from __future__ import annotations

import argparse
import json

from fastuda.cli import parser, run

EXAMPLES = """\
  python -m fastuda.env > env.txt    # attach it to a bug report
  python -m fastuda.env --json"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.env", __doc__ or "", EXAMPLES)
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    return p


def main() -> int:
    """Print the report."""
    args = build_parser().parse_args()
    from fastuda.engine.environment import environment, facts

    print(json.dumps(facts(), indent=1) if args.json else environment(), end="\n" if args.json else "")
    return 0


if __name__ == "__main__":
    run(main)
