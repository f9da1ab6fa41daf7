"""Look at, index, shrink and draw data sets."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastuda.cli import parser, run
from fastuda.errors import UserError

EXAMPLES = """\
  python -m fastuda.data list                             the data sets that are known
  python -m fastuda.data check gta5:/data/gta5            every file, counts, histogram, contact sheet
  python -m fastuda.data check camvid:/data/camvid:dusk --role source
  python -m fastuda.data index cityscapes --data-root /data
                                                          classes per label, for rare-class sampling
  python -m fastuda.data synth --out data/scenes --source 1000
                                                          the built-in street scenes

A domain is NAME, NAME:PATH or NAME:PATH:SPLIT.
Exit code 0: nothing wrong, 1: something is, 2: it cannot be opened."""


def _domain_arguments(p: argparse.ArgumentParser, role: str) -> None:
    p.add_argument("domain", help="NAME, NAME:PATH or NAME:PATH:SPLIT")
    p.add_argument(
        "--role", choices=("source", "target", "evaluation"), default=role, help=f"default: {role}"
    )
    p.add_argument("--data-root", default="data", help="where domains without a path lie (default: data)")
    p.add_argument("--workers", type=int, help="processes (default: one per core; 0: none)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.data", __doc__ or "", EXAMPLES)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the data sets that are known, and how they lie on disk")

    check = commands.add_parser("check", help="read every file: counts, sizes, histogram, what is wrong")
    _domain_arguments(check, "source")
    check.add_argument(
        "--sheet", type=Path, help="write a contact sheet PNG here (default: check_NAME_SPLIT.png)"
    )
    check.add_argument("--no-sheet", action="store_true", help="write none")

    index = commands.add_parser("index", help="classes per label: statistics, sampling, weak labels")
    _domain_arguments(index, "source")
    index.add_argument("--weak", type=Path, help="write image tags and points to this JSON file")
    index.add_argument(
        "--points", type=int, choices=range(6), default=1, help="per class of an image (default: 1)"
    )
    index.add_argument(
        "--min-share", type=float, default=0.0, help="share of the image a tag needs (default: 0)"
    )
    index.add_argument(
        "--tag-share",
        type=float,
        default=0.1,
        help="part of a class's mean share over the images that show it that a tag needs; the published runs"
        " say 0.1 and, counting at another resolution, take 0.025 for Cityscapes (default: 0.1)",
    )

    cache = commands.add_parser("cache", help="smaller copies that load faster, as a folder: data set")
    _domain_arguments(cache, "source")
    cache.add_argument("--out", type=Path, required=True, help="folder of the copies")
    cache.add_argument("--edge", type=int, help="shorter edge of the copies (default: the size as it is)")
    cache.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the images (default: jpg)")
    cache.add_argument("--quality", type=int, default=95, help="of the JPEGs (default: 95)")

    synth = commands.add_parser("synth", help="draw the built-in street scenes in two domains")
    synth.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder (default: data/scenes)")
    for name, count, what in (
        ("source", 400, "labelled synthetic scenes"),
        ("target", 400, "real-looking training scenes"),
        ("evaluation", 100, "real-looking validation scenes"),
        ("height", 128, "pixels"),
        ("width", 256, "pixels"),
        ("seed", 0, "of all scenes"),
    ):
        synth.add_argument(f"--{name}", type=int, default=count, help=f"{what} (default: {count})")
    synth.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main() -> int:
    """Parse and call the command."""
    args = build_parser().parse_args()
    commands = {"list": _list, "check": _check, "index": _index, "cache": _cache, "synth": _synth}
    return commands[args.command](args)


def _list(args: argparse.Namespace) -> int:
    from fastuda.data.catalogue import DOMAINS

    for entry in DOMAINS.values():
        print(f"{entry.name.ljust(18)} {len(entry.classes):3d} classes  {entry.about}")
    print("folder             own classes  images, labels and a classes.yaml; see fastuda/data/folder.py")
    print("scenes              19 classes  built in, drawn on first use")
    return 0


def _check(args: argparse.Namespace) -> int:
    from fastuda.data.check import check_domain, contact_sheet
    from fastuda.data.domains import open_domain
    from fastuda.loggers import setup_logging

    setup_logging(quiet=False)  # images that are left out are named there
    domain = open_domain(args.domain, role=args.role, data_root=args.data_root)
    report = check_domain(domain, need_labels=args.role != "target", workers=args.workers, quiet=args.quiet)
    print(report.text())
    if not args.no_sheet:
        name = f"check_{domain.name}_{domain.split.replace('/', '_')}.png"
        print(f"  pictures: {contact_sheet(domain, args.sheet or Path(name))}")
    return 1 if report.problems else 0


def _index(args: argparse.Namespace) -> int:
    from fastuda.data.domains import open_domain
    from fastuda.data.files import written
    from fastuda.data.index import build_index
    from fastuda.data.sampling import class_probabilities

    if args.weak and args.weak.suffix == ".csv":
        raise UserError(f"--weak writes JSON: give {args.weak} another suffix than .csv")
    domain = open_domain(args.domain, role=args.role, data_root=args.data_root)
    index = build_index(domain, workers=args.workers, quiet=args.quiet)
    chances = class_probabilities(index.frequency, temperature=0.01)
    width = max(len(name) for name in domain.classes.names)
    print(f"{'class'.ljust(width)}  pixels %  images  drawn by data.sampling=rare %")
    for i, name in enumerate(domain.classes.names):
        share, images = 100 * index.frequency[i], int((index.counts[:, i] > 0).sum())
        print(f"{name.ljust(width)}  {share:8.3f}  {images:6d}  {100 * chances[i]:29.1f}")
    for line in index.bad:
        print(f"wrong: {line}")
    if args.weak:
        tags = index.tags(args.min_share) & index.relative_tags(args.tag_share)
        said = {
            "classes": domain.classes.names,
            "images": {
                item.image.relative_to(domain.root).as_posix(): {
                    "tags": [domain.classes.names[c] for c in tags[i].nonzero()[0]],
                    "points": [
                        [y, x, domain.classes.names[c]]
                        for y, x, c in index.first_points(i, args.points)
                        if tags[i, c]
                    ],
                }
                for i, item in enumerate(domain.items)
            },
        }
        with written(args.weak) as draft:
            draft.write_text(json.dumps(said, indent=1))
        print(f"weak labels: {args.weak}", file=sys.stderr)
    return 1 if index.bad else 0


def _cache(args: argparse.Namespace) -> int:
    from fastuda.data.cache import CacheSettings, build_cache
    from fastuda.data.domains import open_domain

    if (args.edge is not None and args.edge < 1) or not 1 <= args.quality <= 100:
        raise UserError("--edge must be positive and --quality from 1 to 100")
    domain = open_domain(args.domain, role=args.role, data_root=args.data_root)
    settings = CacheSettings(args.out, args.edge, args.format, args.quality)
    bad = build_cache(domain, settings, workers=args.workers, quiet=args.quiet)
    for line in bad:
        print(f"wrong: {line}")
    print(f"{len(domain) - len(bad)} images copied; use them as folder:{args.out}")
    return 1 if bad else 0


def _synth(args: argparse.Namespace) -> int:
    from fastuda.data.check import contact_sheet
    from fastuda.data.domains import open_domain
    from fastuda.data.scenes import ScenesConfig, ensure_scenes

    config = ScenesConfig(args.source, args.target, args.evaluation, args.height, args.width, args.seed)
    root = ensure_scenes(args.out, config, quiet=args.quiet)
    for role in ("source", "target"):
        domain = open_domain(f"scenes:{root}", role=role, data_root=root)
        print(f"{role}: {len(domain)} images, {contact_sheet(domain, root / f'{role}.png')}")
    return 0


if __name__ == "__main__":
    run(main)
