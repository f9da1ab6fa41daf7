"""Draw a source and a target image beside the predictions of finished runs of the demo.

The first run folder must contain a source-only run, as ``python -m fastuda.train --method plca`` writes it.
Every run gets a column. The rows are evenly spaced held-out images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastuda.data.domains.run import open_run
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


def main(out: str, runs: list[str], rows: int = 3) -> Image.Image:
    device = torch.device("cpu")
    loaded = [load_run(Path(run), device) for run in (f"{runs[0]}/source_only", *runs)]
    names = ["source-only", *(config.method["name"] for config, _, _ in loaded[1:])]
    config, _, classes = loaded[1]
    data = config.data
    (source, *_), _, target = open_run(data)
    size, resampling = data.eval_size, data.resampling
    predictors = [Predictor(method, classes, device, size, resampling=resampling) for _, method, _ in loaded]

    lines = []
    for index in np.linspace(0, len(target) - 1, rows, dtype=int).tolist():
        drawn, drawn_label = source.read_pair(index)
        image, label = target.read_pair(index)
        maps = [predictor(image)[0] for predictor in predictors]
        lines.append([overlay(drawn, drawn_label, classes), image, *map(classes.colorize, (*maps, label))])
    page = sheet(["source, labelled", "target", *names, "target's labels, not seen"], lines)
    page.save(out, optimize=True)
    print(f"{out}: {rows} of {len(target)} held-out images of {data.target}")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("runs", nargs="+", help="run folders; the first must contain source_only")
    parser.add_argument("--rows", type=int, default=3, help="number of images (default: 3)")
    args = parser.parse_args()
    main(args.out, args.runs, args.rows)
