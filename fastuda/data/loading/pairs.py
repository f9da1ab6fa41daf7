"""Matched images: for every target image another one of the same place, such as by day for one by night."""

from __future__ import annotations

import csv
from pathlib import Path

from fastuda.data.domains.domain import Domain
from fastuda.errors import UserError


def read_pairs(path: str | Path, domain: Domain) -> tuple[Path, ...]:
    """The match of every image of a domain, in its order.

    Args:
        path: a CSV file, or a folder with some at any depth, of lines ``image,match``; relative to the
            domain's folder or to the working directory. Names may leave out a common beginning and a common
            end: ``train/night/GOPR0351/GOPR0351_frame_000001`` for
            ``rgb_anon/train/night/GOPR0351/GOPR0351_frame_000001_rgb_anon.png`` (Dark Zurich's
            ``corresp/train/night``).
        domain: whose images are matched.

    Raises:
        UserError: no such file, an image without a match, or a match that is no file.
    """
    found = _table(path, domain)
    names = [item.image.relative_to(domain.root).as_posix() for item in domain.items]
    beginning, end = _shape(names, found, path)
    matches = []
    for name in names:
        match = found.get(name[len(beginning) : len(name) - len(end)])
        if match is None or not name.startswith(beginning) or not name.endswith(end):
            raise UserError(f"data.pairs: {path} has no match for {name} of {domain.name}")
        file = domain.root / f"{beginning}{match}{end}"
        if not file.is_file():
            raise UserError(f"data.pairs: {path} matches {name} with {file}, which is no file")
        matches.append(file)
    return tuple(matches)


def _table(path: str | Path, domain: Domain) -> dict[str, str]:
    for place in (domain.root / path, Path(path)):
        files = [place] if place.is_file() else sorted(place.rglob("*.csv"))
        if files:
            break
    else:
        raise UserError(f"data.pairs: no CSV file {path}, neither in {domain.root} nor here")
    found: dict[str, str] = {}
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                for row in csv.reader(lines):
                    if len(row) < 2:
                        raise UserError(f"data.pairs: {file} has a line that is not image,match: {row}")
                    found[row[0].strip()] = row[1].strip()
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"data.pairs: {file} cannot be read: {error}") from error
    return found


def _shape(names: list[str], found: dict[str, str], path: str | Path) -> tuple[str, str]:
    """What stands before and after the table's names in the domain's."""
    for known in found:
        around = [name.split(known, 1) for name in names if known in name]
        if around:
            # the shortest end: frame_1 is in frame_10.png, too
            beginning, end = min(around, key=lambda parts: len(parts[1]))
            return beginning, end
    raise UserError(f"data.pairs: {path} names none of the images, such as {names[0] if names else 'none'}")
