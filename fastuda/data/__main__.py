"""Look at, index, shrink and draw data sets."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastuda.cli import a_path, number, parser, run
from fastuda.errors import UserError
from fastuda.system.paths import at_home

EXAMPLES = """\
  python -m fastuda.data list                             the data sets that are known
  python -m fastuda.data check gta5:/data/gta5            every file, counts, histogram, contact sheet
  python -m fastuda.data check camvid:/data/camvid:dusk --role source
  python -m fastuda.data index cityscapes --data-root /data
                                                          classes per label, for rare-class sampling
  python -m fastuda.data cache gta5:/data/gta5 --out /fast/gta5
                                                          copies that are decoded once
  python -m fastuda.data synth --out data/scenes --source 1000
                                                          the built-in street scenes

A domain is NAME, NAME:PATH or NAME:PATH:SPLIT. COMMAND --help tells more.
Exit code 0: nothing wrong, 1: something is, 2: it cannot be opened."""


ABOUT = {
    "list": (
        "the data sets that are known, and how they lie on disk",
        """\
Print a line per data set: its name as --source and --target take it, how many classes it has,
and where its files lie. Nothing needs to be there.

examples:
  python -m fastuda.data list
  python -m fastuda.data list | grep city""",
    ),
    "check": (
        "read every file: counts, sizes, histogram, what is wrong",
        """\
Read every image and label of one split. Prints counts, sizes, the share of every class, and
what is wrong: files that cannot be read, labels of another size than their image, values that
are no class. Leaves a contact sheet: some images, each above its label in colours.

Exit code 0: nothing is wrong, 1: something is, 2: the data set cannot be opened.

examples:
  python -m fastuda.data check gta5:/data/gta5
  python -m fastuda.data check folder:mine/photos --role target --no-sheet
  python -m fastuda.data check cityscapes:/data/cityscapes:val --sheet val.png""",
    ),
    "index": (
        "classes per label: statistics, sampling, weak labels",
        """\
Count the classes of every label, print a line per class, and keep the counts where rare-class
and class-balanced sampling (data.sampling) find them: in ~/.cache/fastuda, or FASTUDA_CACHE.
Labels that have not changed are not read again. With --weak, write which classes each image
shows, and points of them: the file for data.weak_labels.

Exit code 0: every label was read, 1: some could not be, 2: the data set cannot be opened.

examples:
  python -m fastuda.data index gta5:/data/gta5
  python -m fastuda.data index cityscapes:/data/cityscapes --weak tags.json --points 0
  python -m fastuda.data index cityscapes:/data/cityscapes --weak points.json --points 1""",
    ),
    "cache": (
        "smaller copies that load faster, as a folder: data set",
        """\
Copy one split, images as JPEG or PNG and labels as PNG, shrunk to a shorter edge of --edge.
The copy is a data set of its own, folder:OUT, with the same classes. Run again, it goes on
where it was stopped, and copies what has changed.

Exit code 0: every file was copied, 1: some could not be read, 2: it cannot be opened or written.

examples:
  python -m fastuda.data cache gta5:/data/gta5 --out /fast/gta5
  python -m fastuda.data cache synthia:/data/synthia --edge 512 --format png --out /fast/synthia
  python -m fastuda.train --source folder:/fast/gta5 --target cityscapes:/data/cityscapes""",
    ),
    "synth": (
        "draw the built-in street scenes in two domains",
        """\
Draw labelled synthetic street scenes and real-looking ones, in the layouts of GTA5 and
Cityscapes, with a contact sheet of each. Scenes that are there already stay where the settings
are the same, and are drawn anew where they are not. Training on the domain scenes draws
data/scenes by itself.

examples:
  python -m fastuda.data synth
  python -m fastuda.data synth --out more --source 1000 --target 1000 --height 256 --width 512
  python -m fastuda.train --source scenes:more --target scenes:more""",
    ),
}
"""Of every command a line, and its help."""


def _command(commands: Any, name: str) -> argparse.ArgumentParser:
    """A subcommand whose help begins with what it does and ends with examples."""
    line, text = ABOUT[name]
    about, _, examples = text.partition("\n\nexamples:")
    return commands.add_parser(
        name,
        help=line,
        description=about,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _domain_arguments(p: argparse.ArgumentParser, role: str) -> None:
    p.add_argument(
        "domain", metavar="DOMAIN", type=at_home,
        help="NAME, NAME:PATH or NAME:PATH:SPLIT; folder:PATH for your own images",
    )  # fmt: skip
    p.add_argument(
        "--role", choices=("source", "target", "evaluation"), default=role,
        help=f"as what it is opened, which says the split where none is given (default: {role})",
    )  # fmt: skip
    p.add_argument(
        "--data-root", default="data", metavar="DIR", type=at_home,
        help="where domains without a path lie (default: data)",
    )  # fmt: skip
    p.add_argument(
        "--workers", type=number(int, 0), metavar="N", help="processes (default: one per core; 0: none)"
    )
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.data", __doc__ or "", EXAMPLES)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _command(commands, "list")

    check = _command(commands, "check")
    _domain_arguments(check, "source")
    check.add_argument(
        "--sheet", type=a_path, metavar="FILE",
        help="write the contact sheet, a PNG, here (default: check_NAME_SPLIT.png)",
    )  # fmt: skip
    check.add_argument("--no-sheet", action="store_true", help="write no contact sheet")

    index = _command(commands, "index")
    _domain_arguments(index, "source")
    index.add_argument(
        "--weak", type=a_path, metavar="FILE", help="write image tags and points to this JSON file"
    )
    index.add_argument(
        "--points", type=int, choices=range(6), default=1,
        help="of --weak: points per class of an image (default: 1)",
    )  # fmt: skip
    index.add_argument(
        "--min-share", type=number(float, 0, 1), default=0.0, metavar="X",
        help="of --weak: share of the image that a tag needs (default: 0)",
    )  # fmt: skip
    index.add_argument(
        "--tag-share",
        type=number(float, 0, 1),
        default=0.1,
        metavar="X",
        help="of --weak: part of a class's mean share over the images that show it that a tag needs; the"
        " published runs say 0.1 and, counting at another resolution, take 0.025 for Cityscapes"
        " (default: 0.1)",
    )

    cache = _command(commands, "cache")
    _domain_arguments(cache, "source")
    cache.add_argument("--out", type=a_path, required=True, metavar="DIR", help="folder of the copies")
    cache.add_argument(
        "--edge", type=number(int, 1), metavar="N",
        help="shorter edge of the copies in pixels (default: the size as it is; nothing is enlarged)",
    )  # fmt: skip
    cache.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the images (default: jpg)")
    cache.add_argument(
        "--quality",
        type=number(int, 1, 100),
        default=95,
        metavar="N",
        help="of the JPEGs, 1 to 100 (default: 95)",
    )

    synth = _command(commands, "synth")
    synth.add_argument(
        "--out", type=a_path, default=Path("data/scenes"), metavar="DIR", help="folder (default: data/scenes)"
    )
    for name, least, default, what in (
        ("source", 1, 400, "labelled synthetic scenes"),
        ("target", 1, 400, "real-looking training scenes"),
        ("evaluation", 0, 100, "real-looking validation scenes"),
        ("height", 1, 128, "pixels"),
        ("width", 1, 256, "pixels"),
        ("seed", 0, 0, "of all scenes"),
    ):
        synth.add_argument(
            f"--{name}", type=number(int, least), default=default, metavar="N",
            help=f"{what} (default: {default})",
        )  # fmt: skip
    synth.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main() -> int:
    """Parse and call the command."""
    args = build_parser().parse_args()
    commands = {"list": _list, "check": _check, "index": _index, "cache": _cache, "synth": _synth}
    return commands[args.command](args)


def _list(args: argparse.Namespace) -> int:
    from fastuda.data.domains.catalogue import DOMAINS

    for entry in DOMAINS.values():
        print(f"{entry.name.ljust(18)} {len(entry.classes):3d} classes  {entry.about}")
    print("folder             own classes  images, labels and a classes.yaml; see docs/ten-minutes.md")
    print("scenes              19 classes  built in, drawn on first use")
    return 0


def _check(args: argparse.Namespace) -> int:
    from fastuda.data.domains.open import open_domain
    from fastuda.data.tools.check import check_domain, contact_sheet, shared_with_evaluation
    from fastuda.system.log import setup_logging

    setup_logging(quiet=False)  # images that are left out are named there
    domain = open_domain(args.domain, role=args.role, data_root=args.data_root)
    report = check_domain(domain, need_labels=args.role != "target", workers=args.workers, quiet=args.quiet)
    report.notes += shared_with_evaluation(domain, args.domain, args.data_root)
    print(report.text())
    if not args.no_sheet:
        name = f"check_{domain.name}_{domain.split.replace('/', '_')}.png"
        print(f"  pictures: {contact_sheet(domain, args.sheet or Path(name))}")
    return 1 if report.problems else 0


def _index(args: argparse.Namespace) -> int:
    from fastuda.data.domains.open import open_domain
    from fastuda.data.loading.sampling import class_probabilities
    from fastuda.data.tools.index import build_index
    from fastuda.system.files import written

    if args.weak and args.weak.suffix.lower() == ".csv":
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
            draft.write_text(json.dumps(said, indent=1), encoding="utf-8")
        print(f"weak labels: {args.weak}", file=sys.stderr)
    return 1 if index.bad else 0


def _cache(args: argparse.Namespace) -> int:
    from fastuda.data.domains.open import open_domain
    from fastuda.data.tools.cache import CacheSettings, build_cache

    domain = open_domain(args.domain, role=args.role, data_root=args.data_root)
    settings = CacheSettings(args.out, args.edge, args.format, args.quality)
    bad = build_cache(domain, settings, workers=args.workers, quiet=args.quiet)
    for line in bad:
        print(f"wrong: {line}")
    print(f"{len(domain) - len(bad)} images copied; use them as folder:{args.out}")
    return 1 if bad else 0


def _synth(args: argparse.Namespace) -> int:
    from fastuda.data.domains.open import open_domain
    from fastuda.data.scenes import ScenesConfig, ensure_scenes
    from fastuda.data.tools.check import contact_sheet

    config = ScenesConfig(args.source, args.target, args.evaluation, args.height, args.width, args.seed)
    root = ensure_scenes(args.out, config, quiet=args.quiet)
    for role in ("source", "target"):
        domain = open_domain(f"scenes:{root}", role=role, data_root=root)
        print(f"{role}: {len(domain)} images, {contact_sheet(domain, root / f'{role}.png')}")
    return 0


if __name__ == "__main__":
    run(main)
