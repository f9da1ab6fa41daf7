"""Matched images: every target image has another image of the same place, for example by day."""

from __future__ import annotations

import csv
from pathlib import Path

from fastuda.data.domains.domain import Domain
from fastuda.errors import UserError
from fastuda.system.files import reading


def read_pairs(path: str | Path, domain: Domain) -> tuple[Path, ...]:
    """Match of every image of a domain, in the order of its images.

    Args:
        path: CSV file, or a folder with CSV files at any depth, relative to the folder of the domain or to
            the working directory. Lines are ``image,match``. Names may omit a common prefix and suffix:
            ``train/night/GOPR0351/GOPR0351_frame_000001`` for
            ``rgb_anon/train/night/GOPR0351/GOPR0351_frame_000001_rgb_anon.png`` (Dark Zurich's
            ``corresp/train/night``).
        domain: the domain to match.

    Raises:
        UserError: there is no such file, an image has no match, or a match does not exist.
    """
    pairs = _read_lines(path, domain)
    names = [item.image.relative_to(domain.root).as_posix() for item in domain.items]
    prefix, suffix = _affixes(names, pairs, path)
    matches = []
    for name in names:
        match = pairs.get(name[len(prefix) : len(name) - len(suffix)])
        if match is None or not name.startswith(prefix) or not name.endswith(suffix):
            raise UserError(f"data.pairs: {path} has no match for {name} of {domain.name}")
        file = domain.root / f"{prefix}{match}{suffix}"
        if not file.is_file():
            raise UserError(f"data.pairs: {path} matches {name} with {file}, which does not exist")
        matches.append(file)
    return tuple(matches)


def _read_lines(path: str | Path, domain: Domain) -> dict[str, str]:
    """Name of an image to the name of its match."""
    for place in (domain.root / path, Path(path)):
        files = [place] if place.is_file() else sorted(place.rglob("*.csv"))
        if files:
            break
    else:
        raise UserError(f"data.pairs: no CSV file {path} in {domain.root} or in the working directory")
    pairs: dict[str, str] = {}
    for file in files:
        with reading(file, "matched images"), file.open(newline="", encoding="utf-8-sig") as lines:
            for row in csv.reader(lines):
                if len(row) < 2:
                    raise UserError(f"data.pairs: {file} has a line that is not image,match: {row}")
                pairs[row[0].strip()] = row[1].strip()
    return pairs


def _affixes(names: list[str], pairs: dict[str, str], path: str | Path) -> tuple[str, str]:
    """Prefix and suffix that the names in the CSV files omit."""
    for short in pairs:
        affixes = [name.split(short, 1) for name in names if short in name]
        if affixes:
            # the shortest suffix, because frame_1 is also part of frame_10.png
            prefix, suffix = min(affixes, key=lambda parts: len(parts[1]))
            return prefix, suffix
    raise UserError(f"data.pairs: {path} names none of the images, such as {names[0] if names else 'none'}")
