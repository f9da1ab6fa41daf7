"""The parts of a report as HTML; all text from outside is escaped."""

from __future__ import annotations

import html
import math
from pathlib import Path

from fastuda.config.schema import RunConfig
from fastuda.data.labels import ClassSet
from fastuda.inference.scores import PROTOCOLS
from fastuda.report.charts import Curve, chart
from fastuda.report.cycles import covered_picture, drawing
from fastuda.report.facts import BASELINE, Measured, Record, data_uri

NONE = "\u2013"
"""In place of a number that is not there."""
OTHERS = {
    "ignore": "pixels of classes that the run lacks left out",
    "confusion19": "predictions on pixels of classes that the run lacks count as errors",
}
"""What the protocols do, see :class:`fastuda.inference.scores.Scores`."""
TITLES = {
    "train/loss": "Loss",
    "train/feature_matched": "Feature cycles that close in their class",
    "train/feature_covered": "Target pixels that feature cycles pass",
    "train/prediction_matched": "Prediction cycles that close in their class",
    "train/prediction_covered": "Target pixels that prediction cycles pass",
}


def summary(record: Record, baseline: Record | None, config: RunConfig) -> str:
    """The tiles at the top."""
    name, value = record.headline
    where = "no held-out labels" if math.isnan(value) else "on the target's held-out images"
    tiles = [(name, _number(value, ".1f"), where)]
    if baseline is not None:
        base = baseline.headline[1]
        tiles += [(f"{name}, {BASELINE}", _number(base, ".1f"), "same network, steps and seed")]
        tiles += [("Gain", _number(value - base, "+.1f"), "")]
    precision = "float32" if config.train.amp == "off" else config.train.amp.removeprefix("force-")
    for other in PROTOCOLS:
        if f"{name}_{other}" in record.result:
            tiles[0] = (name, tiles[0][1], f"{where}, by {record.result['protocol']}")
            also = _number(record.result[f"{name}_{other}"], ".1f")
            tiles += [(name, also, f"by {other}: {OTHERS[other]}")]
    tiles += [("Steps", str(record.result["step"]), f"seed {config.train.seed}, {precision}")]
    cells = "".join(
        f"<div><dt>{html.escape(what)}</dt><dd>{number} <small>{html.escape(more)}</small></dd></div>"
        for what, number, more in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def curve_charts(record: Record, baseline: Record | None, method: str) -> str:
    """mIoU, the loss and each of its terms, the other means, the learning rates."""
    name = record.headline[0]

    def both(key: str) -> list[Curve]:
        found = [Curve(method, record.curves.get(key, []))]
        return found + ([Curve(BASELINE, baseline.curves.get(key, []))] if baseline else [])

    charts = [chart(f"{name} on held-out images", both(f"val/{name}"))]
    keys = [key for key in record.curves if key.startswith("train/")]
    for key in sorted(keys, key=lambda key: (key != "train/loss", key)):
        shared = baseline is not None and key in baseline.curves and key != "train/loss"
        curves = both(key) if shared else [Curve(method, record.curves[key])]
        charts.append(chart(TITLES.get(key, key.removeprefix("train/").replace("_", " ")), curves))
    rates = [Curve(k.removeprefix("lr/"), v) for k, v in record.curves.items() if k.startswith("lr/")]
    charts.append(chart("Learning rate", rates))
    drawn = [text for text in charts if text]
    if not drawn:
        return "<p>metrics.csv is not in the run folder.</p>"
    first, rest = "".join(drawn[:2]), "".join(drawn[2:])
    if rest:
        rest = f"<details><summary>Every term of the loss, and more</summary>{_grid(rest)}</details>"
    return _grid(first) + rest


def _grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>'


def class_table(record: Record, baseline: Record | None, measured: Measured, method: str) -> str:
    """IoU of every class as bars and numbers, against source-only where there is one."""
    names = list(record.result["iou"])
    values = [[record.iou(name) for name in names] + [record.headline[1]]]
    if baseline is not None:
        values.append([baseline.iou(name) for name in names] + [baseline.headline[1]])
    names.append(record.headline[0])
    return _table("IoU in percent", names, values, method, measured.classes, ".1f", sign=1)


def distance_table(measured: Measured, method: str) -> str:
    """Class-centre distances, likewise; or why there are none."""
    if not measured.distances or measured.classes is None:
        return f"<p>Not measured: {html.escape(measured.missing)}</p>" if measured.missing else ""
    values = [[*found, _mean(found)] for found in measured.distances.values()]
    names = [*measured.classes.names, "mean"]
    return (
        "<p>Of the features of a class: their variance over the squared distance to the other classes'"
        f" centres; lower is tighter. Measured on {measured.images} held-out images.</p>"
        + _table("Distance", names, values, method, measured.classes, ".2f", sign=-1)
    )


def _table(
    what: str,
    names: list[str],
    values: list[list[float]],
    method: str,
    classes: ClassSet | None,
    how: str,
    sign: int,
) -> str:
    """A row per name (the last one in the foot): bars and numbers of the run and, second, of source-only;
    ``sign``: whether more is better (1) or worse (-1)."""
    colours = dict(zip(classes.names, classes.palette, strict=True)) if classes else {}
    longest = max((v for column in values for v in column if not math.isnan(v)), default=1.0) or 1.0
    full = 100.0 if sign > 0 else longest
    rows = []
    for name, *row in zip(names, *values, strict=True):
        swatch = ""
        if name in colours:
            r, g, b = colours[name]
            swatch = f'<i class="swatch" style="background:rgb({r},{g},{b})"></i>'
        bars = "".join(_bar(100 * value / full, f"c{i}") for i, value in enumerate(row))
        cells = [f'<th scope="row">{swatch}{html.escape(name)}{bars}</th>']
        cells += [f"<td>{_number(value, how)}</td>" for value in row]
        cells += [_difference(row[0] - row[1], how, sign)] if len(row) == 2 else []
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [html.escape(method), BASELINE, "difference"] if len(values) == 2 else [html.escape(method)]
    colour = [f'<i class="key c{i}"></i>' for i in range(len(values))] + [""]
    head = "".join(f'<th scope="col">{c}{h}</th>' for c, h in zip(colour, heads, strict=False))
    return (
        f'<table><thead><tr><th scope="col">{what}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows[:-1])}</tbody><tfoot>{rows[-1]}</tfoot></table>"
    )


def _bar(percent: float, kind: str) -> str:
    return f'<span class="bar {kind}" style="width:{0.0 if math.isnan(percent) else percent:.1f}%"></span>'


def _number(value: float, how: str) -> str:
    return NONE if math.isnan(value) else format(value, how)


def _difference(value: float, how: str, sign: int) -> str:
    if math.isnan(value):
        return f"<td>{NONE}</td>"
    value = round(value, int(how[1])) + 0.0  # no minus before a zero
    kind = "" if value == 0 else "good" if value * sign > 0 else "bad"
    return f'<td class="{kind}">{value:+{how}}</td>'


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def viewer(pictures: list[dict[str, str]], measured: Measured) -> str:
    """Two layers of one picture with a divider to move, and buttons to choose among the pictures."""
    if not pictures:
        return "<p>The run left no pictures (eval.pictures=0).</p>"
    layers = [key for key in pictures[0] if key != "name"]

    def side(which: str) -> str:
        buttons = "".join(
            f'<button type="button" data-side="{which}" data-layer="{layer}" aria-pressed="false">{layer}'
            "</button>"
            for layer in layers
        )
        return (
            f"<fieldset><legend>{which.capitalize()} of the divider</legend><div>{buttons}</div></fieldset>"
        )

    thumbs = "".join(
        f'<button type="button" data-index="{i}" aria-pressed="false" aria-label="Show'
        f' {html.escape(picture["name"])}"><img alt=""></button>'
        for i, picture in enumerate(pictures)
    )
    return (
        '<div id="viewer"><div class="stage"><img class="left" alt=""><img class="right" alt="">'
        '<span class="edge"></span></div>'
        '<label>Divider <input type="range" min="0" max="100" value="50" step="1"></label>'
        f'<p class="name soft" aria-live="polite"></p><div class="sides">{side("left")}{side("right")}</div>'
        f'<div class="thumbs" role="group" aria-label="Pictures">{thumbs}</div></div>'
        f"{_legend(measured.classes)}"
    )


def _legend(classes: ClassSet | None) -> str:
    if classes is None:
        return ""
    items = "".join(
        f'<li><i class="swatch" style="background:rgb({r},{g},{b})"></i>{html.escape(name)}</li>'
        for name, (r, g, b) in zip(classes.names, classes.palette, strict=True)
    )
    return f'<ul class="classes" aria-label="Colours of the classes">{items}</ul>'


def association(measured: Measured) -> str:
    """PLCA's cycles between two images, and the target pixels that they cover; nothing for other methods."""
    found, classes = measured.cycles, measured.classes
    if found is None or classes is None:
        return ""
    valid = int((found.labels != 255).sum())
    closed, covered = int(found.closed.sum()), int((found.covered != 255).sum())
    share = 100 * covered / len(found.covered)
    svg = drawing(found, classes, data_uri(found.source, True), data_uri(found.target, True))
    picture = data_uri(covered_picture(found, classes), True)
    return (
        "<h2>Cycles</h2>"
        "<p>A source pixel (above) is matched to its most similar target pixel (below, solid line), and that"
        " one back to a source pixel (dashed). The cycle closes where it ends in the class in which it began:"
        f" {closed} of {valid} do. They pass {covered} of the {len(found.covered)} target pixels"
        f" ({share:.1f} %), shown in the colour of the class that found them.</p>"
        f'<div class="two"><figure>{svg}<figcaption>Source, target and <span id="cycle-said"></span> cycles'
        " per kind, the classes in turn</figcaption>"
        '<label>Cycles <input type="range" id="cycle-count" min="1" max="60" value="16" step="1"></label>'
        '<button type="button" id="cycle-open" aria-pressed="false">Also cycles that do not close</button>'
        f'</figure><figure><img src="{picture}" alt="Target image with the covered pixels in colour">'
        "<figcaption>Covered pixels of the target image</figcaption></figure></div>"
    )


def speed(record: Record, baseline: Record | None, config: RunConfig, method: str) -> str:
    """Medians over the run of what the clock and the allocator said."""
    runs = {html.escape(method): record} | ({BASELINE: baseline} if baseline else {})
    rows: dict[str, list[str]] = {}
    for found in runs.values():
        step, wait, peak = (found.median(f"perf/{key}") for key in ("step_s", "data_s", "peak_mib"))
        each = config.data.batch_size * config.train.accumulate * int(found.result.get("processes", 1))
        rows.setdefault("Step (median)", []).append(NONE if step is None else f"{step:.3g} s")
        rows.setdefault("Image pairs per second", []).append(f"{each / step:.3g}" if step else NONE)
        share = f"{100 * wait / step:.0f} %" if step and wait is not None else NONE
        rows.setdefault("Share of a step that waits for data", []).append(share)
        rows.setdefault("Peak memory of a process", []).append(NONE if peak is None else f"{peak:.0f} MiB")
        processes = str(found.result.get("processes", NONE))
        rows.setdefault("Processes", []).append(processes)
    both = f" ({BASELINE}'s training included, where one does both)" if baseline else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in runs)
    body = "".join(
        f'<tr><th scope="row">{what}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for what, cells in rows.items()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Speed and memory"><table>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"
        "</table></div>"
        '<p class="soft">Memory: the most that was allocated on the GPU, or, on a CPU, the most that the'
        f" process has held since it began{both}.</p>"
    )


def about(folder: Path) -> str:
    """The configuration, and the versions and hardware, as the run saved them."""
    parts = []
    for name, what, opened in (
        ("env.txt", "Versions, hardware, and what can run", " open"),
        ("config.yaml", "Configuration", ""),
    ):
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if name == "env.txt":
            text, _, rest = text.partition("ops:\n")
            parts.append(_details(what, text, opened))
            if rest:
                parts.append(_details("Ops and their implementations", rest, ""))
        else:
            parts.append(_details(what, text, opened))
    return "".join(parts)


def _details(what: str, text: str, opened: str) -> str:
    scrolls = f'tabindex="0" role="region" aria-label="{what}"'
    return f"<details{opened}><summary>{what}</summary><pre {scrolls}>{html.escape(text)}</pre></details>"
