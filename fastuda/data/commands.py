"""The commands of ``python -m fastuda.data``; each takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastuda.errors import UserError


def list_domains(args: argparse.Namespace) -> int:
    """Print the built-in data sets."""
    from fastuda.data.domains.catalogue import DOMAINS

    for entry in DOMAINS.values():
        print(f"{entry.name.ljust(18)} {len(entry.classes):3d} classes  {entry.about}")
    print("folder             own classes  images, labels and a classes.yaml; see docs/ten-minutes.md")
    print("scenes              19 classes  built in, drawn on first use")
    return 0


def check(args: argparse.Namespace) -> int:
    """Print the contents and problems of data sets; 1 if there are problems."""
    from fastuda.data.domains.open import open_domain, split_specs
    from fastuda.data.tools.check import check_domain, contact_sheet, shared_with_evaluation
    from fastuda.system.log import setup_logging

    setup_logging(quiet=False)  # logs the images that are left out
    specs = split_specs(args.domain)
    if args.sheet:
        _single(specs, "--sheet is the picture of one data set")
    wrong = False
    # all are opened before the first is read
    for spec, domain in [(s, open_domain(s, role=args.role, data_root=args.data_root)) for s in specs]:
        report = check_domain(
            domain, need_labels=args.role != "target", workers=args.workers, quiet=args.quiet
        )
        report.notes += shared_with_evaluation(domain, spec, args.data_root)
        print(report.text())
        if not args.no_sheet:
            root = f"_{domain.root.name}" if len(specs) > 1 else ""
            name = f"check_{domain.name}{root}_{domain.split.replace('/', '_')}.png"
            print(f"  pictures: {contact_sheet(domain, args.sheet or Path(name))}")
        wrong |= bool(report.problems)
    return int(wrong)


def _single(specs: tuple[str, ...], reason: str) -> str:
    """The only one of the data sets.

    Raises:
        UserError: there are several.
    """
    if len(specs) > 1:
        raise UserError(f"{reason}, and {', '.join(specs)} are {len(specs)}: take one after another")
    return specs[0]


def index(args: argparse.Namespace) -> int:
    """Print the classes of data sets and write weak labels; 1 if labels cannot be read."""
    from fastuda.data.domains.open import open_domain, split_specs
    from fastuda.data.loading.sampling import class_probabilities
    from fastuda.data.loading.weak_labels import write_weak_labels
    from fastuda.data.tools.index import build_index

    if args.weak and args.weak.suffix.lower() == ".csv":
        raise UserError(f"--weak writes JSON: give {args.weak} another suffix than .csv")
    specs = split_specs(args.domain)
    if args.weak:
        _single(specs, "--weak writes the weak labels of one data set")
    wrong = False
    for domain in [open_domain(spec, role=args.role, data_root=args.data_root) for spec in specs]:
        label_index = build_index(domain, workers=args.workers, quiet=args.quiet)
        chances = class_probabilities(label_index.frequency, temperature=0.01)
        if len(specs) > 1:
            print(f"{domain.name}, split {domain.split}, in {domain.root}")
        width = max(len(name) for name in domain.classes.names)
        print(f"{'class'.ljust(width)}  pixels %  images  drawn by data.sampling=rare %")
        for i, name in enumerate(domain.classes.names):
            share, images = 100 * label_index.frequency[i], int((label_index.counts[:, i] > 0).sum())
            print(f"{name.ljust(width)}  {share:8.3f}  {images:6d}  {100 * chances[i]:29.1f}")
        for message in label_index.bad:
            print(f"wrong: {message}")
        if args.weak:
            tags = label_index.tags(args.min_share) & label_index.relative_tags(args.tag_share)
            write_weak_labels(args.weak, domain, label_index, tags, args.points)
            print(f"weak labels: {args.weak}", file=sys.stderr)
        wrong |= bool(label_index.bad)
    return int(wrong)


def cache(args: argparse.Namespace) -> int:
    """Copy a data set; 1 if files cannot be read."""
    from fastuda.data.domains.open import open_domain, split_specs
    from fastuda.data.tools.cache import CacheSettings, build_cache

    spec = _single(split_specs(args.domain), "--out takes the copy of one data set")
    domain = open_domain(spec, role=args.role, data_root=args.data_root)
    settings = CacheSettings(args.out, args.edge, args.format, args.quality)
    unreadable = build_cache(domain, settings, workers=args.workers, quiet=args.quiet)
    for message in unreadable:
        print(f"wrong: {message}")
    print(f"{len(domain) - len(unreadable)} images copied; use them as folder:{args.out}")
    return 1 if unreadable else 0


def synth(args: argparse.Namespace) -> int:
    """Draw the built-in scenes and their contact sheets."""
    from fastuda.data.domains.open import open_domain
    from fastuda.data.scenes import ScenesConfig, ensure_scenes
    from fastuda.data.tools.check import contact_sheet

    config = ScenesConfig(args.source, args.target, args.evaluation, args.height, args.width, args.seed)
    root = ensure_scenes(args.out, config, quiet=args.quiet)
    for role in ("source", "target"):
        domain = open_domain(f"scenes:{root}", role=role, data_root=root)
        print(f"{role}: {len(domain)} images, {contact_sheet(domain, root / f'{role}.png')}")
    return 0


COMMANDS = {"list": list_domains, "check": check, "index": index, "cache": cache, "synth": synth}
