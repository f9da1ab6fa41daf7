"""Draws the pictures of the benchmarks. bench/results/scaling.png, for bench/README.md, shows time and memory
against N, from the newest rows of bench.run --sweep. docs/assets/pictures/adaptation.png, for
docs/results.md, shows the mIoU of every method, from the rows of bench.adaptation."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from bench import gains, table
from bench.registry import SWEEP
from fastuda import cli
from fastuda.errors import UserError
from fastuda.system.files import written

EXAMPLES = """\
  python -m bench.run --sweep && python -m bench.plot
  python -m bench.adaptation --table && python -m bench.plot"""
PAIR = "idda_cityscapes"
FEW = "data.source=SOURCE,TARGET:few.txt data.source_weights=[1,1]"
LABELS = gains.SHOWN | {FEW: "and 50 labelled photographs"}


def scaling(plt: Any) -> Path:
    """Time and extra memory of the sweep against N, a curve per provider.

    Raises:
        UserError: there are no rows.
    """
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
    return _save(figure, table.HERE / "results" / "scaling.png")


def bars(plt: Any) -> Path:
    """A bar for the mean mIoU of every method and setting, a dot for every seed, and a line at source_only.

    Raises:
        UserError: there are no rows.
    """
    groups: dict[str, list[float]] = {}
    for row in gains.load(gains.HERE / "results" / f"{PAIR}.csv"):
        groups.setdefault(label_of(row), []).append(float(row[gains.SCORE]))
    if "source_only" not in groups:
        raise UserError(f"bench/results/{PAIR}.csv has no row of source_only: run bench.adaptation first")
    means = {label: statistics.fmean(scores) for label, scores in groups.items()}
    order = sorted(means, key=means.__getitem__)
    figure, axis = plt.subplots(figsize=(9, 0.38 * len(order) + 1))
    for place, label in enumerate(order):
        scores, mean = groups[label], means[label]
        axis.barh(place, mean, color="tab:gray" if label == "source_only" else "tab:blue")
        axis.plot(scores, [place] * len(scores), "o", color="black", markersize=3)
        axis.text(max(scores) + 0.4, place, f"{mean:.1f}", va="center")
    axis.axvline(means["source_only"], color="tab:gray", linewidth=1)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlim(0, max(map(max, groups.values())) + 5)
    axis.set_xlabel("mIoU; a dot per seed")
    return _save(figure, gains.PAGE.parent / "assets" / "pictures" / "adaptation.png")


def label_of(row: dict[str, str]) -> str:
    """Method and settings of a row, in short."""
    settings = LABELS.get(row["settings"])
    if settings is None:
        words = [word for word in row["settings"].split() if word.startswith("method.")]
        settings = " ".join(re.sub(r"method\.(weak_labels=)?", "", word) for word in words)
    return f"{row['method']}, {settings}" if settings else row["method"]


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    with written(path) as draft:
        figure.savefig(draft, dpi=90, format="png")
    return path


def main() -> int:
    """Draw the pictures and write them."""
    cli.parser("bench.plot", __doc__ or "", EXAMPLES).parse_args()
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"the plots need matplotlib ({error}): pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for path in (scaling(plt), bars(plt)):
        print(f"wrote {path}")
    table.write()
    print(f"wrote {table.HERE / 'README.md'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
