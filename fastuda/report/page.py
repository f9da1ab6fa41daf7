"""One page about a finished run: report.html in its folder, a single file that needs no network."""

from __future__ import annotations

from pathlib import Path

from fastuda.data.domains.open import NO_SPLIT, short_name, source_title
from fastuda.inference.saved import load_config
from fastuda.methods import BASELINE
from fastuda.report import sections
from fastuda.report.facts import BASELINE_LABEL, Record, measure
from fastuda.report.pictures import names_of, read_pictures
from fastuda.report.rendering import render
from fastuda.system.files import written
from fastuda.system.random import rng_state, set_rng_state


def write_report(folder: Path, device: str = "auto") -> Path:
    """Write ``report.html`` into a run folder. The global random generators do not change.

    If the network or the data is not available, the report gives the reason and leaves out what needs them:
    the class-centre distances and the method's cycles.

    Raises:
        UserError: the folder holds no finished run, or cannot be written.
    """
    config, record = load_config(folder), Record.read(folder)
    beside = folder / BASELINE if (folder / BASELINE / "result.json").is_file() else None
    runs = sections.Runs(str(config.method["name"]), record, Record.read(beside) if beside else None)
    before = rng_state()
    try:
        measured = measure(folder, config, beside, device)
    finally:
        set_rng_state(before)
    split = record.result["split"]
    shown = {"prediction": folder} | ({BASELINE_LABEL: beside} if beside else {})
    pictures = read_pictures(shown, names_of(folder), labelled=split != NO_SPLIT)
    source, target = source_title(config.data.source), short_name(config.data.target)
    page = render(
        "report.html",
        title=f"{runs.method}: {source} to {target} ({split})",
        tiles=sections.tiles(runs, config),
        charts=sections.charts(runs, measured.titles),
        iou=sections.class_table(runs, measured.classes),
        distances=sections.distance_table(runs, measured),
        measured=measured,
        pictures=pictures,
        cycles=sections.cycles(measured),
        speed=sections.speed(runs, config),
        baseline=BASELINE_LABEL if beside else "",
        files=sections.files(folder),
    )
    path = folder / "report.html"
    with written(path, fsync=True) as draft:
        draft.write_text(page, encoding="utf-8")
    return path
