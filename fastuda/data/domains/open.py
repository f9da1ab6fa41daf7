"""Opens a domain for a role.

A domain is specified as ``name`` or ``name:path[:split]``. The default path is ``<data root>/<name>``.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from fastuda.data.config import DataConfig
from fastuda.data.domains.catalogue import DOMAINS
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.entry import DomainEntry
from fastuda.data.domains.folder import folder_entry
from fastuda.data.domains.layouts import Item, Layout
from fastuda.data.domains.splits import evaluation_split, is_list, list_file, select
from fastuda.data.labels import ClassSet
from fastuda.errors import UserError, nearest
from fastuda.system.log import log_is_quiet
from fastuda.system.paths import at_home

log = logging.getLogger("fastuda")

ROLES = ("source", "target", "evaluation")
AUTO = "auto"
"""The default split of the role."""
NO_SPLIT = "none"
"""A split without images: nothing is evaluated."""


def parse_spec(spec: str) -> tuple[str, str | None, str | None]:
    """Name, path and split of ``name[:path[:split]]``.

    A path with colons is used whole if it is a folder; otherwise the last colon precedes the split.
    """
    name, _, rest = spec.partition(":")
    is_path = ":" not in rest or os.path.isdir(os.path.expanduser(rest))
    path, _, split = (rest, "", "") if is_path else rest.rpartition(":")
    if not name:
        raise UserError(f"domain {spec!r} has no name; write name, name:path or name:path:split")
    return name, path or None, split or None


def split_specs(text: str) -> tuple[str, ...]:
    """Domains of a list that is joined by commas. A folder that exists may have commas in its name.

    Raises:
        UserError: a domain has no name.
    """
    parts, specs = text.split(","), []
    while parts:
        parse_spec(parts[0])
        # the longest beginning whose folder exists, or else the first part
        for count in range(len(parts), 0, -1):
            spec = at_home(",".join(parts[:count]))
            path = parse_spec(spec)[1] or ""
            if count == 1 or ("," in path and os.path.isdir(path)):
                break
        specs.append(spec)
        parts = parts[count:]
    return tuple(specs)


def short_name(spec: str) -> str:
    """Name of a domain in tables and titles; a ``folder`` domain includes the name of its folder."""
    name, path, _ = parse_spec(spec)
    return f"{name}:{Path(path).name}" if name == "folder" and path else name


def source_title(text: str) -> str:
    """The same for one or several sources."""
    return " + ".join(map(short_name, split_specs(text)))


def only_scenes(text: str) -> bool:
    """Whether all sources are the built-in scenes."""
    return all(parse_spec(spec)[0] == "scenes" for spec in split_specs(text))


def find_root(entry: DomainEntry, path: str | None, data_root: Path) -> Path:
    """Folder of a data set.

    Raises:
        UserError: the folder does not exist.
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
        f"no folder {candidates[0]} for the domain {entry.name}; give its path as {entry.name}:PATH "
        f"or with --data-root"
    )


def _entry(name: str, path: str | None, role: str) -> DomainEntry:
    """Description of the domain with this name."""
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
    """Folder of the domain with this name; ``scenes`` are drawn if they are missing."""
    if name == "folder":
        return Path(str(path)).expanduser()
    if name == "scenes":
        from fastuda.data.scenes import ensure_scenes

        folder = Path(path).expanduser() if path else data_root / "scenes"
        return ensure_scenes(folder, quiet=log_is_quiet()) / entry.name
    return find_root(entry, path, data_root)


def classes_of(spec: str, role: str) -> ClassSet:
    """Classes of a domain. Its files need not exist, except ``classes.yaml`` of a ``folder`` domain.

    Raises:
        UserError: there is no such domain.
    """
    name, path, _ = parse_spec(spec)
    return _entry(name, path, role).classes


def open_domain(spec: str, *, role: str, data_root: str | Path, split: str | None = None) -> Domain:
    """Open the domain that ``spec`` names.

    ``scenes`` is the built-in pair of domains, drawn on first use under ``<data root>/scenes``: synthetic
    scenes in GTA5's layout as source, real-looking scenes in Cityscapes' layout as target.

    Args:
        role: source, target or evaluation. Source and evaluation need a label for every image; target only
            if ``split`` is given.
        split: replaces the split in ``spec``; ``auto`` is the split that evaluates the one in ``spec``.

    Raises:
        UserError: the name or split is unknown, the folder is missing or cannot be read, there are no images,
            or images have no label.
    """
    if role not in ROLES:
        raise ValueError(f"role is one of {', '.join(ROLES)}, not {role!r}")
    try:
        return _open(spec, role, data_root, split)
    except OSError as error:
        raise UserError(f"the domain {spec} cannot be read: {error}") from error


def _open(spec: str, role: str, data_root: str | Path, split: str | None) -> Domain:
    name, path, spec_split = parse_spec(spec)
    entry = _entry(name, path, role)
    root = _root(name, path, entry, Path(data_root))
    if role == "evaluation" and split == NO_SPLIT:
        target = open_domain(f"{name}:{root}" if path else name, role="target", data_root=data_root)
        return replace(target, split=NO_SPLIT, items=[])
    labelled = role != "target" or split is not None
    if split == AUTO or (role == "evaluation" and split is None):
        split = evaluation_split(root, entry, spec_split)
    split = split or spec_split or (entry.source_split if role == "source" else entry.target_split)
    items, label_map, layout = select(root, entry, split)
    if labelled:
        items = _labelled(items, entry, layout, root, split, role)
    numbers = {class_name: i for i, class_name in enumerate(entry.classes.names)}
    label_map = replace(label_map, names={**numbers, **label_map.names})
    return Domain(
        name, split, root, items, entry.classes, label_map, entry.fit_labels, assumed_void=entry.assumed_void
    )


def _labelled(
    items: list[Item], entry: DomainEntry, layout: Layout, root: Path, split: str, role: str
) -> list[Item]:
    """Items with a label.

    Raises:
        UserError: images have no label, and the data set is not partly labelled.
    """
    unlabelled = [item.image for item in items if item.label is None]
    if not unlabelled:
        return items
    if entry.partly_labelled and len(unlabelled) < len(items):
        log.info("%s: %d of %d images have no label and are left out", root, len(unlabelled), len(items))
        return [item for item in items if item.label is not None]
    hint = f"; data.eval_split={NO_SPLIT} trains without scores" if role == "evaluation" else ""
    templates = " or ".join(rule.template for rule in layout.labels)
    raise UserError(
        f"{len(unlabelled)} of {len(items)} images in {root} (split {split}) have no label;"
        f" the first is {unlabelled[0]}, looked for {templates}{hint}"
    )


def absolute(data: DataConfig) -> DataConfig:
    """The same configuration with absolute paths, valid in every working directory."""

    def absolute_path(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    def domain(spec: str) -> str:
        name, path, split = parse_spec(spec)
        if split and path and is_list(split) and list_file(Path(path).expanduser(), split) == Path(split):
            split = absolute_path(split)
        return ":".join([name, absolute_path(path), *([split] if split else [])]) if path else spec

    return replace(
        data,
        source=",".join(map(domain, split_specs(data.source))),
        target=domain(data.target),
        data_root=absolute_path(data.data_root),
        weak_labels=data.weak_labels and absolute_path(data.weak_labels),
    )
