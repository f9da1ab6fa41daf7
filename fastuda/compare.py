"""Compare finished runs: mean and spread over seeds by method, per class, as a table, files and a plot."""

from __future__ import annotations

import csv
import html
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from fastuda.checkpoint import write_atomic
from fastuda.cli import parser, run
from fastuda.errors import UserError
from fastuda.saved import load_config

EXAMPLES = """\
  python -m fastuda.compare runs/*
  python -m fastuda.compare runs/* --out comparison        CSV, Markdown, HTML and a plot
  python -m fastuda.compare runs/* --json"""


@dataclass(frozen=True)
class Group:
    """Runs of one method on one pair of domains."""

    method: str
    domains: str
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    """mIoU and class to the values of the runs, in the order of the seeds; NaN for an absent class."""

    def mean(self, name: str) -> float:
        """Mean of a score over the runs that have it."""
        known = [value for value in self.scores.get(name, ()) if not math.isnan(value)]
        return statistics.fmean(known) if known else math.nan

    def spread(self, name: str) -> float:
        """Standard deviation over the runs; NaN for a single one."""
        known = [value for value in self.scores.get(name, ()) if not math.isnan(value)]
        return statistics.stdev(known) if len(known) > 1 else math.nan


def read_groups(folders: list[Path]) -> list[Group]:
    """The finished runs under the folders given, grouped by domains and method.

    Raises:
        UserError: there is none.
    """
    found: dict[tuple[str, str], list[tuple[int, dict[str, float]]]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("result.json")):
            try:
                result = json.loads(path.read_text())
                scores = {key: value for key, value in result.items() if key.startswith("mIoU")}
                scores = {k: math.nan if v is None else v for k, v in (scores | result["iou"]).items()}
                about = f"{result['target']} ({result['split']})"
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{path} is not a result of a run: {error!r}") from error
            config = load_config(path.parent)
            source = config.data.source.partition(":")[0]
            key = (f"{source} -> {about}", str(config.method["name"]))
            found.setdefault(key, []).append((config.train.seed, scores))
    if not found:
        raise UserError(f"no finished run under {', '.join(map(str, folders))}: none holds a result.json")
    groups = []
    for (domains, method), runs in found.items():
        runs.sort(key=lambda item: item[0])
        names = list(dict.fromkeys(name for _, scores in runs for name in scores))
        values = {name: tuple(scores.get(name, math.nan) for _, scores in runs) for name in names}
        groups.append(Group(method, domains, tuple(seed for seed, _ in runs), values))
    return sorted(groups, key=lambda g: (g.domains, g.mean(headline(g))))


def headline(group: Group) -> str:
    """The name of the score over all classes."""
    return next(name for name in group.scores if name.startswith("mIoU"))


def cell(group: Group, name: str) -> str:
    """``mean`` or ``mean ± spread``; empty where no run has the score."""
    mean, spread = group.mean(name), group.spread(name)
    if math.isnan(mean):
        return ""
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def markdown(groups: list[Group]) -> str:
    """A table per pair of domains: methods down, protocols and classes across."""
    text = ""
    for domains in dict.fromkeys(group.domains for group in groups):
        chosen = [group for group in groups if group.domains == domains]
        names = list(dict.fromkeys(name for group in chosen for name in group.scores))
        text += f"## {domains}\n\n| method | seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}\n"
        for group in chosen:
            seeds = ", ".join(map(str, group.seeds))
            text += f"| {group.method} | {seeds} | {' | '.join(cell(group, name) for name in names)} |\n"
        text += "\n"
    return text


def page(groups: list[Group], plot: str) -> str:
    """The same as one HTML file; ``plot`` is an SVG."""
    style = (
        "body{font:1rem/1.5 system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem}"
        "div{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:right}"
        "tr:nth-child(even){background:#8882}td:first-child,th:first-child{text-align:left}"
        "svg{max-width:100%;height:auto;background:white}:root{color-scheme:light dark}"
    )
    body = ""
    for line in markdown(groups).splitlines():
        if line.startswith("## "):
            body += f"<h2>{html.escape(line[3:])}</h2><div><table>\n"
            head = True
        elif line.startswith("|---"):
            head = False
        elif line.startswith("|"):
            tag = "th" if head else "td"
            cells = "".join(f"<{tag}>{html.escape(c.strip())}</{tag}>" for c in line.strip("|").split("|"))
            body += f"<tr>{cells}</tr>\n"
        elif body.endswith("</tr>\n"):
            body += "</table></div>\n"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>fastuda: comparison</title>'
        f"<style>{style}</style><h1>Comparison</h1>{body}<h2>mIoU</h2>{plot}</html>\n"
    )


def draw(groups: list[Group], path: Path) -> None:
    """Bars of the mean mIoU with the single seeds as dots; the format is that of the file's name."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install matplotlib, or leave --out away") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.45 * len(groups)))
    for row, group in enumerate(groups):
        name = headline(group)
        axis.barh(row, group.mean(name), color="#4c78a8", height=0.6)
        axis.plot(group.scores[name], [row] * len(group.seeds), "k.", markersize=6)
    axis.set_yticks(range(len(groups)), [f"{g.method}\n{g.domains}" for g in groups], fontsize=8)
    axis.set_xlabel(headline(groups[0]))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def write(groups: list[Group], out: Path) -> None:
    """comparison.csv, .md, .svg, .png and .html in a folder."""
    out.mkdir(parents=True, exist_ok=True)

    def rows(draft: Path) -> None:
        with draft.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("domains", "method", "seed", "score", "value"))
            for group in groups:
                for name, values in group.scores.items():
                    for seed, value in zip(group.seeds, values, strict=True):
                        writer.writerow((group.domains, group.method, seed, name, value))

    write_atomic(out / "comparison.csv", rows)
    write_atomic(out / "comparison.md", lambda draft: draft.write_text(markdown(groups)))
    draw(groups, out / "comparison.png")
    draw(groups, out / "comparison.svg")
    svg = (out / "comparison.svg").read_text()
    picture = svg[svg.index("<svg") :]
    write_atomic(out / "comparison.html", lambda draft: draft.write_text(page(groups, picture)))


def main() -> int:
    """Parse, read, print, write."""
    p = parser("fastuda.compare", __doc__ or "", EXAMPLES)
    p.add_argument("runs", type=Path, nargs="+", help="run folders, or folders of them")
    p.add_argument(
        "--out", type=Path, help="write comparison.csv, .md, .html, .svg and .png into this folder"
    )
    p.add_argument("--json", action="store_true", help="print means, spreads and values as JSON")
    args = p.parse_args()
    missing = [str(folder) for folder in args.runs if not folder.is_dir()]
    if missing:
        raise UserError(f"no folder {', '.join(missing)}")
    groups = read_groups(args.runs)
    if args.out:
        write(groups, args.out)
        print(f"written to {args.out}", file=sys.stderr)
    if args.json:
        said = [
            {"domains": g.domains, "method": g.method, "seeds": g.seeds,
             "scores": {n: {"mean": _plain(g.mean(n)), "spread": _plain(g.spread(n)),
                            "values": [_plain(v) for v in g.scores[n]]} for n in g.scores}}
            for g in groups
        ]  # fmt: skip
        print(json.dumps(said, indent=1))
    else:
        print(markdown(groups), end="")
    return 0


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


if __name__ == "__main__":
    run(main)
