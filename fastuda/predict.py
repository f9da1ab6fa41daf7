"""Segment your own images with a finished run: label ids, palette pictures and overlays."""

from __future__ import annotations

from pathlib import Path

from fastuda.cli import parser, run
from fastuda.errors import UserError

EXAMPLES = """\
  python -m fastuda.predict runs/plca photo.jpg --out predictions
  python -m fastuda.predict runs/plca folder/of/images --out predictions --save labels overlay
  python -m fastuda.predict runs/plca images --out predictions --size 512 1024"""


def main() -> int:
    """Parse, load, predict."""
    p = parser("fastuda.predict", __doc__ or "", EXAMPLES)
    p.add_argument("run", type=Path, help="run folder with config.yaml and model.safetensors")
    p.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    p.add_argument("--out", type=Path, required=True, help="folder for labels/, color/ and overlay/")
    p.add_argument(
        "--save", nargs="+", choices=["labels", "color", "overlay"], default=["labels", "color", "overlay"],
        help="labels: one-channel PNG of train ids; color: palette PNG; overlay: colours over the image",
    )  # fmt: skip
    p.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="size that the network sees")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    args = p.parse_args()

    from fastuda import distributed
    from fastuda.data.layouts import IMAGE_SUFFIXES
    from fastuda.prediction import predict_files
    from fastuda.saved import load_run

    files: list[tuple[Path, Path]] = []
    for path in args.images:
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            files += [(f, f.relative_to(path)) for f in found]
        elif path.is_file():
            files.append((path, Path(path.name)))
        else:
            raise UserError(f"no image or folder at {path}")
    if not files:
        raise UserError(f"no images in {', '.join(map(str, args.images))} ({', '.join(IMAGE_SUFFIXES)})")
    device = distributed.start(args.device).device
    config, method, classes = load_run(args.run, device)
    size = tuple(args.size) if args.size else config.data.eval_size
    rate = predict_files(method, classes, files, args.out, set(args.save), size, device, args.quiet)
    print(f"{len(files)} images, {rate:.2f} images/s, written to {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
