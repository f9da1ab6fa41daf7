"""Time and extra memory against N from the results of ``python -m bench.run --sweep``."""

from __future__ import annotations

import matplotlib

from bench import table
from bench.registry import SWEEP

matplotlib.use("Agg")


def main() -> None:
    """Draw ``bench/results/scaling.png``, of the machine measured last, and put it into the README."""
    import matplotlib.pyplot as plt

    sizes = {(c.op, c.mode, c.dtype, c.shape): c.pixels for c in SWEEP}
    ops = list(dict.fromkeys(c.op for c in SWEEP))
    keyed = (((r["op"], r["mode"], r["dtype"], r["shape"]), r) for r in table.load() if not r["note"])
    rows = [(sizes[key], row) for key, row in keyed if key in sizes]
    if not rows:
        raise SystemExit("bench/results holds no sweep yet: run `python -m bench.run --sweep` first")
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
    figure.savefig(table.HERE / "results" / "scaling.png", dpi=90)
    table.write()


if __name__ == "__main__":
    main()
