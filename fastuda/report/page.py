"""One page about a finished run: report.html in its folder, a single file that needs no network."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path


def write_report(folder: Path, device: str = "auto") -> Path:
    """Write ``report.html`` into a run folder; the global random generators are left as they were.

    What needs the network or the data (class-centre distances, PLCA's cycles) is left out, with the reason,
    where they are not there.

    Raises:
        UserError: the folder holds no finished run, or cannot be written.
    """
    from fastuda.data.domains.open import NO_SPLIT, short_name
    from fastuda.inference.saved import load_config
    from fastuda.report import sections
    from fastuda.report.facts import Record, measure, read_pictures
    from fastuda.system.files import written
    from fastuda.system.random import rng_state, set_rng_state

    config = load_config(folder)
    method = str(config.method["name"])
    record = Record.read(folder)
    beside = folder / "source_only" if (folder / "source_only" / "result.json").is_file() else None
    baseline = Record.read(beside) if beside else None
    before = rng_state()
    try:
        measured = measure(folder, config, beside, device)
    finally:
        set_rng_state(before)
    pictures = read_pictures(folder, beside, record.result.get("split") != NO_SPLIT)
    source, target = short_name(config.data.source), short_name(config.data.target)
    title = f"{method}: {source} to {target} ({record.result.get('split', '')})"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        sections.summary(record, baseline, config),
        "<h2>Curves</h2>",
        sections.curve_charts(record, baseline, method),
        "<h2>Classes</h2>",
        sections.class_table(record, baseline, measured, method),
        "<h2>Class-centre distances</h2>",
        sections.distance_table(measured, method),
        "<h2>Pictures</h2>",
        sections.viewer(pictures, measured),
        sections.association(measured),
        "<h2>Speed and memory</h2>",
        sections.speed(record, baseline, config, method),
        "<h2>What was run</h2>",
        sections.about(folder),
    ]
    page = resources.files("fastuda.report").joinpath("report.html").read_text(encoding="utf-8")
    # each field is cut out of the template alone: text of the user's could look like one
    first, _, rest = page.partition("{{title}}")
    second, _, rest = rest.partition("{{body}}")
    third, _, last = rest.partition("{{pictures}}")
    data = json.dumps(pictures).replace("<", "\\u003c")
    whole = first + html.escape(f"fastuda: {title}") + second + "\n".join(body) + third + data + last
    path = folder / "report.html"
    with written(path, fsync=True) as draft:
        draft.write_text(whole, encoding="utf-8")
    return path
