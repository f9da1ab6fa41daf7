"""Segment your own images and videos with a finished run.

Writes class numbers, palette pictures, overlays and probabilities."""

from __future__ import annotations

import argparse
import json
import os
import sys

from fastuda.cli import LESS_MEMORY, a_path, bare_amp, inference, inference_flags, number, parser, run

IDS = ("train", "cityscapes")

EXAMPLES = """\
  python -m fastuda.predict runs/plca photo.jpg --out predictions
  python -m fastuda.predict runs/plca folder/of/images drive.mp4 --out predictions --save labels overlay
  python -m fastuda.predict runs/plca images --out predictions --size 512 1024
  python -m fastuda.predict runs/plca images --out predictions --save labels --ids cityscapes
  python -m fastuda.predict runs/plca images --out predictions --scales 0.75 1 1.25 --flip
  python -m fastuda.predict runs/plca aerial.tif --out predictions --window 512 512 --save probabilities
                                  images of over 178 million pixels need pip install 'fastuda[large]'
  python -m fastuda.predict runs/plca images --out predictions method.test_aggregation=false

The first argument is a folder with config.yaml and model.safetensors, or a file written by
fastuda export --format safetensors.
Exit codes: 0: every file was labelled, 1: some files could not be read, which are listed, 2: no output."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.predict", __doc__ or "", EXAMPLES)
    p.add_argument("run", type=a_path, help="run folder, or exported .safetensors file")
    p.add_argument(
        "images",
        nargs="+",
        type=a_path,
        help="images, videos, folders of them, and key=value settings of method.*",
    )
    p.add_argument("--out", type=a_path, required=True, help="folder for labels/, color/ and overlay/")
    p.add_argument(
        "--save", nargs="+", choices=["labels", "color", "overlay", "probabilities"],
        default=["labels", "color", "overlay"],
        help="labels: one-channel PNG of class numbers, whose names are in classes.yaml; color: palette PNG;"
        " overlay: colours over the image; probabilities: float16 [K, H, W] as .npy. For a video, color and"
        " overlay are videos, and the others are one file per frame",
    )  # fmt: skip
    p.add_argument(
        "--ids", choices=IDS, default="train",
        help="numbers in labels/: train: positions in classes.yaml, counted from 0 (default); cityscapes:"
        " Cityscapes' labelIds, which its official scripts expect",
    )  # fmt: skip
    p.add_argument(
        "--size",
        nargs=2,
        type=number(int, 1),
        metavar=("H", "W"),
        help="size of the network's input (default: the run's data.eval_size)",
    )
    inference_flags(p)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--json", action="store_true", help="print a summary as JSON")
    p.add_argument("--quiet", action="store_true", help="no progress bar, print only errors")
    return p


def main() -> int:
    """Parse, load, predict."""
    args = build_parser().parse_intermixed_args(bare_amp(sys.argv[1:]))

    from fastuda.inference.prediction import describe, predict_files
    from fastuda.inference.predictor import Predictor, label_ids
    from fastuda.inference.reading import find_files
    from fastuda.inference.saved import load_run, override
    from fastuda.system.distributed import pick_device
    from fastuda.system.files import clean
    from fastuda.system.log import setup_logging
    from fastuda.system.memory import memory_suffices

    setup_logging(quiet=True)
    # not path.exists(), which refuses a long list of numbers as a file name
    settings = [path for path in args.images if "=" in str(path) and not os.path.exists(path)]
    files = find_files([path for path in args.images if path not in settings], args.out)
    device = pick_device(args.device)
    how = inference(args, device)
    config, method, classes = load_run(args.run, device)
    config = override(config, method, [str(setting) for setting in settings])
    size = tuple(args.size) if args.size else config.data.eval_size
    ids = label_ids(args.ids, classes)
    predictor = Predictor(method, classes, device, size, how, config.data.resampling, ids)
    clean(args.out)
    for kind in args.save:
        clean(args.out / kind, recursive=True)
    with memory_suffices(device, LESS_MEMORY):
        done = predict_files(predictor, files, args.out, set(args.save), quiet=args.quiet)
    describe(args.out, classes, ids)
    if args.json:
        report = done.as_dict() | {"out": str(args.out), "saved": sorted(args.save)}
        print(json.dumps(report, indent=1))
    elif not args.quiet:
        left_out = f", {len(done.bad)} left out" if done.bad else ""
        print(f"{done.images} images, {done.rate:.2f} images/s{left_out}, written to {args.out}")
    return 1 if done.bad else 0


if __name__ == "__main__":
    run(main)
