"""A picture of what adaptation changed: source, target, and both predictions of a finished run of the demo.

Usage: python before_and_after.py RUN OUT.png [ROWS]

RUN was trained beside source-only, as ``python -m fastuda.train --method plca`` does. The rows are evenly spread
over the held-out images.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastuda.data.domains.open import open_domain, share_classes
from fastuda.inference.pictures import overlay
from fastuda.inference.prediction import Predictor
from fastuda.inference.saved import load_run

GAP, HEAD = 6, 26


def sheet(titles: list[str], rows: list[list[np.ndarray]]) -> Image.Image:
    """Pictures [H, W, 3] of one size in rows, with a title over each column."""
    height, width = rows[0][0].shape[:2]
    size = (len(titles) * (width + GAP) - GAP, HEAD + len(rows) * (height + GAP) - GAP)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for column, title in enumerate(titles):
        x = column * (width + GAP)
        draw.text((x + width / 2, HEAD / 2), title, "black", font, anchor="mm")
        for row, pictures in enumerate(rows):
            page.paste(Image.fromarray(pictures[column]), (x, HEAD + row * (height + GAP)))
    return page


def main(run: str, out: str, count: int = 3) -> Image.Image:
    device = torch.device("cpu")
    config, adapted, classes = load_run(Path(run), device)
    _, before, _ = load_run(Path(run) / "source_only", device)
    data = config.data
    source = open_domain(data.source, role="source", data_root=data.data_root)
    target = open_domain(data.target, role="evaluation", data_root=data.data_root, split=data.eval_split)
    source, target, _ = share_classes(source, target, data.classes, data.class_alias)

    rows = []
    for index in np.linspace(0, len(target) - 1, count, dtype=int).tolist():
        drawn, drawn_label = source.read_pair(index)
        image, label = target.read_pair(index)
        maps = [Predictor(method, classes, device)(image)[0] for method in (before, adapted)]
        rows.append([overlay(drawn, drawn_label, classes), image, *map(classes.colorize, (*maps, label))])
    page = sheet(
        ["source, labelled", "target", "source-only", config.method["name"], "target's labels, not seen"], rows
    )
    page.save(out)
    print(f"{out}: {count} of {len(target)} held-out images of {data.target}")
    return page


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit((__doc__ or "").strip())
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
