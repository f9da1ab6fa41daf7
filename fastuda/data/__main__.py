"""Check, index, copy and draw data sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastuda.cli import a_path, number, parser, run
from fastuda.data import commands
from fastuda.system.paths import at_home

EXAMPLES = """\
  python -m fastuda.data list                             the supported data sets
  python -m fastuda.data check gta5:/data/gta5            read every file; histogram, contact sheet
  python -m fastuda.data check camvid:/data/camvid:dusk --role source
  python -m fastuda.data index cityscapes --data-root /data
                                                          count classes, for rare-class sampling
  python -m fastuda.data cache gta5:/data/gta5 --out /fast/gta5
                                                          smaller copies that load faster
  python -m fastuda.data synth --out data/scenes --source 1000
                                                          the built-in street scenes

DOMAIN is NAME, NAME:PATH or NAME:PATH:SPLIT. check and index accept several, separated by commas.
SPLIT may be a file LIST.txt with the names of images. See COMMAND --help.
Exit code 0: no problems, 1: problems, 2: the data set cannot be opened."""


ABOUT = {
    "list": (
        "the supported data sets and their layout on disk",
        """\
Print one line per data set: its name for --source and --target, its number of classes, and the
layout of its files. The data sets need not be on this machine.

examples:
  python -m fastuda.data list
  python -m fastuda.data list | grep city""",
    ),
    "check": (
        "read every file: counts, sizes, histogram, problems",
        """\
Read every image and label of a split. Print counts, sizes, the share of every class, and problems:
files that cannot be read, labels that differ in size from their image, and values without a class.
Write a contact sheet of some images, each above its label in colours.

Exit code 0: no problems, 1: problems, 2: the data set cannot be opened.

examples:
  python -m fastuda.data check gta5:/data/gta5
  python -m fastuda.data check folder:mine/photos --role target --no-sheet
  python -m fastuda.data check cityscapes:/data/cityscapes:val --sheet val.png""",
    ),
    "index": (
        "count the classes of every label, for sampling and weak labels",
        """\
Count the classes of every label and print one line per class. The counts are stored in
~/.cache/fastuda, or FASTUDA_CACHE, for rare-class and class-balanced sampling (data.sampling).
Labels that have not changed are not read again. --weak writes a file for data.weak_labels with the
classes of each image and points of these classes.

Exit code 0: every label was read, 1: some could not be read, 2: the data set cannot be opened.

examples:
  python -m fastuda.data index gta5:/data/gta5
  python -m fastuda.data index cityscapes:/data/cityscapes --weak tags.json --points 0
  python -m fastuda.data index cityscapes:/data/cityscapes --weak points.json --points 1""",
    ),
    "cache": (
        "smaller copies that load faster, as a folder: data set",
        """\
Copy a split, with images as JPEG or PNG and labels as PNG. --edge shrinks them to this shorter
edge. The copy is a data set with the same classes, folder:OUT. Run the command again to continue an
interrupted copy or to copy changed files.

Exit code 0: every file was copied, 1: some could not be read, 2: the data set cannot be opened, or
the copy cannot be written.

examples:
  python -m fastuda.data cache gta5:/data/gta5 --out /fast/gta5
  python -m fastuda.data cache synthia:/data/synthia --edge 512 --format png --out /fast/synthia
  python -m fastuda.train --source folder:/fast/gta5 --target cityscapes:/data/cityscapes""",
    ),
    "synth": (
        "draw the built-in street scenes in two domains",
        """\
Draw labelled synthetic and real-looking street scenes, in the layouts of GTA5 and Cityscapes, with
a contact sheet of each. Existing scenes are kept if the settings are the same, and replaced
otherwise. Training on the domain scenes draws data/scenes automatically.

examples:
  python -m fastuda.data synth
  python -m fastuda.data synth --out more --source 1000 --target 1000 --height 256 --width 512
  python -m fastuda.train --source scenes:more --target scenes:more""",
    ),
}
"""Summary and help text of every command."""


def _command(subparsers: Any, name: str) -> argparse.ArgumentParser:
    """Parser of a command; its help starts with the description and ends with examples."""
    summary, text = ABOUT[name]
    about, _, examples = text.partition("\n\nexamples:")
    return subparsers.add_parser(
        name,
        help=summary,
        description=about,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _domain_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "domain", metavar="DOMAIN", type=at_home,
        help="NAME, NAME:PATH or NAME:PATH:SPLIT, separated by commas; folder:PATH for your own images",
    )  # fmt: skip
    p.add_argument(
        "--role", choices=("source", "target", "evaluation"), default="source",
        help="role of the domain, which sets the default split (default: source)",
    )  # fmt: skip
    p.add_argument(
        "--data-root", default="data", metavar="DIR", type=at_home,
        help="folder of the domains that have no path (default: data)",
    )  # fmt: skip
    p.add_argument(
        "--workers", type=number(int, 0), metavar="N", help="processes (default: one per core; 0: none)"
    )
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.data", __doc__ or "", EXAMPLES)
    subparsers = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _command(subparsers, "list")

    check = _command(subparsers, "check")
    _domain_arguments(check)
    check.add_argument(
        "--sheet", type=a_path, metavar="FILE",
        help="PNG file of the contact sheet (default: check_NAME_SPLIT.png)",
    )  # fmt: skip
    check.add_argument("--no-sheet", action="store_true", help="write no contact sheet")

    index = _command(subparsers, "index")
    _domain_arguments(index)
    index.add_argument(
        "--weak", type=a_path, metavar="FILE", help="write image tags and points to this JSON file"
    )
    index.add_argument(
        "--points", type=int, choices=range(6), default=1,
        help="with --weak: points per class and image (default: 1)",
    )  # fmt: skip
    index.add_argument(
        "--min-share", type=number(float, 0, 1), default=0.0, metavar="X",
        help="with --weak: smallest share of the image that a tagged class fills (default: 0)",
    )  # fmt: skip
    index.add_argument(
        "--tag-share", type=number(float, 0, 1), default=0.1, metavar="X",
        help="with --weak: smallest share that a tagged class fills, relative to its mean share over the"
        " images that contain it (default: 0.1, as published; for Cityscapes use 0.025, because the"
        " published code counts the means at half the resolution)",
    )  # fmt: skip

    cache = _command(subparsers, "cache")
    _domain_arguments(cache)
    cache.add_argument("--out", type=a_path, required=True, metavar="DIR", help="folder of the copies")
    cache.add_argument(
        "--edge", type=number(int, 1), metavar="N",
        help="shorter edge of the copies in pixels; images are never enlarged (default: keep the size)",
    )  # fmt: skip
    cache.add_argument(
        "--format", choices=("jpg", "png"), default="jpg", help="format of the images (default: jpg)"
    )
    cache.add_argument(
        "--quality", type=number(int, 1, 100), default=95, metavar="N",
        help="quality of JPEG images, 1 to 100 (default: 95)",
    )  # fmt: skip

    synth = _command(subparsers, "synth")
    synth.add_argument(
        "--out", type=a_path, default=Path("data/scenes"), metavar="DIR", help="folder (default: data/scenes)"
    )
    for name, least, default, meaning in (
        ("source", 1, 400, "labelled synthetic scenes"),
        ("target", 1, 400, "real-looking training scenes"),
        ("evaluation", 0, 100, "real-looking validation scenes"),
        ("height", 1, 128, "height in pixels"),
        ("width", 1, 256, "width in pixels"),
        ("seed", 0, 0, "seed of all scenes"),
    ):
        synth.add_argument(
            f"--{name}", type=number(int, least), default=default, metavar="N",
            help=f"{meaning} (default: {default})",
        )  # fmt: skip
    synth.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main() -> int:
    """Parse the command line and run the command."""
    args = build_parser().parse_args()
    return commands.COMMANDS[args.command](args)


if __name__ == "__main__":
    run(main)
