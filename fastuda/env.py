"""``python -m fastuda.env``: versions, devices, and every op with what can run it here."""

from __future__ import annotations

from fastuda.cli import parser, run


def main() -> int:
    """Print the report."""
    parser(
        "fastuda.env", __doc__ or "", "  python -m fastuda.env > env.txt    # attach it to a bug report"
    ).parse_args()
    from fastuda.report_env import environment

    print(environment(), end="")
    return 0


if __name__ == "__main__":
    run(main)
