"""Domains opened for one role, and brought to common classes.

A domain is named ``name`` or ``name:path[:split]``. Without a path it is looked for in ``<data
root>/<name>``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastuda.data.config import DataConfig
from fastuda.data.domains.catalogue import DOMAINS
from fastuda.data.domains.classes import class_mapping
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.entry import DomainEntry
from fastuda.data.domains.folder import folder_entry
from fastuda.data.domains.layouts import Item, Layout
from fastuda.data.domains.splits import evaluation_split, select
from fastuda.data.labels import ClassSet
from fastuda.errors import UserError, nearest
from fastuda.system.log import log_is_quiet

log = logging.getLogger("fastuda")

ROLES = ("source", "target", "evaluation")
AUTO = "auto"
"""The split that the table names for the role."""
NO_SPLIT = "none"
"""The split without images: nothing is evaluated."""


def parse_spec(spec: str) -> tuple[str, str | None, str | None]:
    """name, path and split of ``name[:path[:split]]``. A path with colons is taken whole where it is a
    folder, else the split is what stands after its last colon."""
    name, _, rest = spec.partition(":")
    whole = ":" not in rest or os.path.isdir(os.path.expanduser(rest))
    path, _, split = (rest, "", "") if whole else rest.rpartition(":")
    if not name:
        raise UserError(f"domain {spec!r} has no name; write name, name:path or name:path:split")
    return name, path or None, split or None


def short_name(spec: str) -> str:
    """A domain as tables and titles show it: its name, of an own folder with the folder's."""
    name, path, _ = parse_spec(spec)
    return f"{name}:{Path(path).name}" if name == "folder" and path else name


def find_root(entry: DomainEntry, path: str | None, data_root: Path) -> Path:
    """The folder of a data set.

    Raises:
        UserError: it is not there.
    """
    if path is not None:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise UserError(f"no folder {root} for the domain {entry.name}")
        return root
    candidates = [data_root / name for name in (entry.name, *entry.folders)]
    for root in candidates:
        if root.is_dir():
            return root
    raise UserError(
        f"no folder {candidates[0]} for the domain {entry.name}; give its place as {entry.name}:PATH "
        f"or with --data-root"
    )


def _entry(name: str, path: str | None, role: str) -> DomainEntry:
    """The table's line of a named domain."""
    if name == "folder":
        if path is None:
            raise UserError("domain folder needs a path: folder:PATH")
        return folder_entry(Path(path).expanduser())
    if name == "scenes":
        return DOMAINS["gta5" if role == "source" else "cityscapes"]
    if name not in DOMAINS:
        if Path(name).expanduser().is_dir():
            raise UserError(f"unknown domain {name!r}; a folder of your own is folder:{name}")
        raise UserError(f"unknown domain {name!r}{nearest(name, (*DOMAINS, 'folder', 'scenes'))}")
    return DOMAINS[name]


def _root(name: str, path: str | None, entry: DomainEntry, data_root: Path) -> Path:
    """The folder of a named domain; the scenes are drawn where they are missing."""
    if name == "folder":
        return Path(str(path)).expanduser()
    if name == "scenes":
        from fastuda.data.scenes import ensure_scenes

        place = Path(path).expanduser() if path else data_root / "scenes"
        root = ensure_scenes(place, quiet=log_is_quiet())
        return root / entry.name
    return find_root(entry, path, data_root)


def classes_of(spec: str, role: str) -> ClassSet:
    """The classes of the domain that ``spec`` names; its files need not be there, but for a folder's
    ``classes.yaml``.

    Raises:
        UserError: no such domain.
    """
    name, path, _ = parse_spec(spec)
    return _entry(name, path, role).classes


def open_domain(spec: str, *, role: str, data_root: str | Path, split: str | None = None) -> Domain:
    """The domain that ``spec`` names.

    ``scenes`` is the built-in pair of domains: drawn on first use under ``<data root>/scenes``, the synthetic
    side for the source in GTA5's layout, the real-looking side for the target in Cityscapes' layout.

    Args:
        role: source and evaluation need a label for every image; target only where ``split`` is given.
        split: instead of the one in ``spec``; ``auto`` is the one that evaluates the split in ``spec``.

    Raises:
        UserError: unknown name or split, missing folder or one that cannot be read, no images, images without
            label.
    """
    if role not in ROLES:
        raise ValueError(f"role is one of {', '.join(ROLES)}, not {role!r}")
    try:
        return _open(spec, role, data_root, split)
    except OSError as error:
        raise UserError(f"the domain {spec} cannot be read: {error}") from error


def _open(spec: str, role: str, data_root: str | Path, split: str | None) -> Domain:
    name, path, said = parse_spec(spec)
    entry = _entry(name, path, role)
    root = _root(name, path, entry, Path(data_root))
    if role == "evaluation" and split == NO_SPLIT:
        everything = open_domain(f"{name}:{root}" if path else name, role="target", data_root=data_root)
        return replace(everything, split=NO_SPLIT, items=[])
    labelled = role != "target" or split is not None
    if split == AUTO or (role == "evaluation" and split is None):
        split = evaluation_split(root, entry, said)
    split = split or said or (entry.source_split if role == "source" else entry.target_split)
    items, label_map, layout = select(root, entry, split)
    if labelled:
        items = _labelled(items, entry, layout, root, split, role)
    own = {known: i for i, known in enumerate(entry.classes.names)}
    label_map = replace(label_map, names={**own, **label_map.names})
    return Domain(
        name, split, root, items, entry.classes, label_map, entry.fit_labels, assumed_void=entry.assumed_void
    )


def _labelled(
    items: list[Item], entry: DomainEntry, layout: Layout, root: Path, split: str, role: str
) -> list[Item]:
    """Every item with its label.

    Raises:
        UserError: images without label, unless the data set is known for them.
    """
    bare = [item.image for item in items if item.label is None]
    if not bare:
        return items
    if entry.partly_labelled and len(bare) < len(items):
        log.info("%s: %d of %d images have no label and are left out", root, len(bare), len(items))
        return [item for item in items if item.label is not None]
    hint = f"; data.eval_split={NO_SPLIT} trains without scores" if role == "evaluation" else ""
    raise UserError(
        f"{len(bare)} of {len(items)} images in {root} (split {split}) have no label;"
        f" the first is {bare[0]}, looked for {' or '.join(rule.template for rule in layout.labels)}{hint}"
    )


def share_classes(
    source: Domain, *targets: Domain, classes: Sequence[str] | None = None, aliases: Sequence[str] = ()
) -> tuple[Domain, ...]:
    """Source and targets in the classes that they share by name, in the target's order and names; these,
    and what is left out, are logged.

    Args:
        targets: the target's splits, which have one set of classes: the one that is trained on, and then
            those that are evaluated, whose further classes become :attr:`Domain.others`.
        classes: keep only these.
        aliases: further pairs that mean one class, ``target=source``.

    Raises:
        UserError: they share none, or a name in ``classes`` or ``aliases`` is no class of either.
    """
    mapping = class_mapping(source.classes, targets[0].classes, classes, aliases)
    for line in mapping.describe().splitlines():
        log.info("%s", line)
    return (
        source.renumber(mapping.shared, mapping.source),
        targets[0].renumber(mapping.shared, mapping.target),
        *(held.renumber(mapping.shared, mapping.target, keep_others=True) for held in targets[1:]),
    )


def absolute(data: DataConfig) -> DataConfig:
    """The same domains and files by paths that hold in every working directory."""

    def place(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    def domain(spec: str) -> str:
        name, path, split = parse_spec(spec)
        return ":".join([name, place(path), *([split] if split else [])]) if path else spec

    return replace(
        data,
        source=domain(data.source),
        target=domain(data.target),
        data_root=place(data.data_root),
        weak_labels=data.weak_labels and place(data.weak_labels),
    )
