"""Plots time and extra memory against N as bench/results/scaling.png, from the newest rows of bench.run
--sweep, and adds it to bench/README.md."""

from __future__ import annotations

from bench import table
from bench.registry import SWEEP
from fastuda import cli
from fastuda.errors import UserError
from fastuda.system.files import written

EXAMPLES = """\
  python -m bench.run --sweep && python -m bench.plot"""


def main() -> int:
    """Draw the plot and write it."""
    cli.parser("bench.plot", __doc__ or "", EXAMPLES).parse_args()
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"the plot needs matplotlib ({error}): pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = {(c.op, c.mode, c.dtype, c.shape): c.pixels for c in SWEEP}
    ops = list(dict.fromkeys(c.op for c in SWEEP))
    keyed = (((r["op"], r["mode"], r["dtype"], r["shape"]), r) for r in table.load() if not r["note"])
    rows = [(sizes[key], row) for key, row in keyed if key in sizes]
    if not rows:
        raise UserError("bench/results holds no sweep yet: run python -m bench.run --sweep first")
    latest = max((row for _, row in rows), key=lambda row: row["date"])["machine"]
    figure, axes = plt.subplots(2, len(ops), figsize=(5 * len(ops), 7), squeeze=False)
    for column, op in enumerate(ops):
        series: dict[str, list[tuple[int, float, float]]] = {}
        for size, row in rows:
            if row["op"] == op and row["machine"] == latest:
                point = (size, float(row["p50"]), max(float(row["extra_mib"]), 1.0))
                series.setdefault(row["provider"], []).append(point)
        for provider, points in series.items():
            points.sort()
            for line, axis in ((1, axes[0][column]), (2, axes[1][column])):
                axis.loglog([p[0] for p in points], [p[line] for p in points], "o-", label=provider)
        axes[0][column].set_title(f"{op}, {SWEEP[0].mode}, {SWEEP[0].dtype}, C = {SWEEP[0].channels}")
        axes[0][column].set_ylabel("ms")
        axes[1][column].set_ylabel("extra MiB")
        axes[1][column].set_xlabel("N")
        axes[0][column].legend()
    figure.suptitle(latest)
    figure.tight_layout()
    path = table.HERE / "results" / "scaling.png"
    with written(path) as draft:
        figure.savefig(draft, dpi=90, format="png")
    table.write()
    print(f"wrote {path} and {table.HERE / 'README.md'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
