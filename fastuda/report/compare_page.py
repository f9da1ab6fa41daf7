"""A comparison of runs as one HTML file, and its plot."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Protocol

STYLE = """\
:root{color-scheme:light dark;--bar:#4c78a8;--text:#1c1d20;--soft:#5d6068;--line:#dcdcd6;--back:#fbfbf9}
@media(prefers-color-scheme:dark){:root{--bar:#7da7d9;--text:#e6e6e3;--soft:#a3a7ae;--line:#383c43;--back:#15171a}}
"""
PAGE = """\
body{font:1rem/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:70rem;padding:0 1rem;
background:var(--back);color:var(--text)}
.scroll{overflow-x:auto;margin:.5rem 0 1.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--soft);font-weight:500}
tbody th{font-weight:400}
tr>:first-child{text-align:left;position:sticky;left:0;background:var(--back)}
svg{max-width:100%;height:auto}
"""
DRAWING = """\
.bar{fill:var(--bar)}.seed{fill:var(--text);stroke:var(--back)}text{fill:var(--text);font:13px system-ui}
"""


class Row(Protocol):
    """What is shown of runs of one method."""

    @property
    def method(self) -> str: ...
    @property
    def domains(self) -> str: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def scores(self) -> dict[str, tuple[float, ...]]: ...
    @property
    def headline(self) -> str: ...
    def mean(self, name: str) -> float: ...
    def cell(self, name: str) -> str: ...


def plot(groups: Sequence[Row]) -> str:
    """SVG with a bar for every mean mIoU and a dot for every seed; it follows the reader's light or dark."""
    shown = [group for group in groups if not math.isnan(group.mean(group.headline))]
    width, left, step, top = 720, 250, 44, 8
    values = [v for g in shown for v in (*g.scores[g.headline], g.mean(g.headline)) if not math.isnan(v)]
    scale = (width - left - 60) / max([*values, 1.0])
    parts = []
    for row, group in enumerate(shown):
        y, mean = top + row * step, group.mean(group.headline)
        parts.append(
            f'<text x="0" y="{y + 16}">{html.escape(group.method)}</text>'
            f'<text x="0" y="{y + 32}" opacity=".7" font-size="11">{html.escape(group.domains)}</text>'
            f'<rect class="bar" x="{left}" y="{y + 6}" width="{mean * scale:.1f}" height="24" rx="3"/>'
        )
        parts += [
            f'<circle class="seed" cx="{left + v * scale:.1f}" cy="{y + 18}" r="4"/>'
            for v in group.scores[group.headline]
            if not math.isnan(v)
        ]
        end = max([mean, *(v for v in group.scores[group.headline] if not math.isnan(v))])
        parts.append(f'<text x="{left + end * scale + 10:.1f}" y="{y + 23}">{mean:.1f}</text>')
    said = "; ".join(f"{g.method}, {g.domains}: {g.cell(g.headline)}" for g in shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * top + step * len(shown)}"'
        f' width="{width}" role="img" aria-label="mIoU. {html.escape(said)}">'
        f"<style>{STYLE}{DRAWING}</style>{''.join(parts)}</svg>"
    )


def page(groups: Sequence[Row]) -> str:
    """For every pair of domains the methods, and the methods class by class; then the plot."""
    body = ""
    for domains in dict.fromkeys(group.domains for group in groups):
        chosen = [group for group in groups if group.domains == domains]
        names = list(dict.fromkeys(name for group in chosen for name in group.scores))
        protocols = [name for name in names if name.startswith("mIoU")]
        classes = [name for name in names if name not in protocols]
        body += f"<h2>{html.escape(domains)}</h2>"
        body += _table(
            ["method", "seeds", *protocols],
            [[g.method, ", ".join(map(str, g.seeds)), *(g.cell(name) for name in protocols)] for g in chosen],
            f"Methods, {domains}",
        )
        body += "<h3>Classes</h3>" + _table(
            ["class", *(group.method for group in chosen)],
            [[name, *(group.cell(name) for group in chosen)] for name in classes],
            f"Classes, {domains}",
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastuda: comparison</title><style>{STYLE}{PAGE}</style></head><body><h1>Comparison</h1>"
        f"<p>Means over seeds in percent, with the standard deviation where there are several.</p>{body}"
        f"<h2>mIoU</h2><p>A bar is a mean, a dot is a seed.</p>{plot(groups)}</body></html>\n"
    )


def _table(heads: list[str], rows: list[list[str]], label: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
