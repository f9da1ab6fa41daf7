"""The domains of a run (its sources, its target, and the images that are held out) and their classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from fastuda.data.config import DataConfig
from fastuda.data.domains.classes import ClassMapping, class_mapping
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.open import classes_of, open_domain, split_specs
from fastuda.data.labels import UNKNOWN, ClassSet
from fastuda.errors import UserError

log = logging.getLogger("fastuda")


class RunDomains(NamedTuple):
    """The domains of a run, with train ids of its classes."""

    sources: tuple[Domain, ...]
    target: Domain
    held_out: Domain

    @property
    def classes(self) -> ClassSet:
        """The classes that the run trains."""
        return self.target.classes


def open_run(data: DataConfig) -> RunDomains:
    """Open the domains of a configuration, with the classes that they share.

    Raises:
        UserError: a domain cannot be read, shares no class with the target, or has images that are held out;
            or ``source_weights`` does not fit the sources.
    """
    specs = split_specs(data.source)
    weights = data.source_weights
    if weights is not None and (len(weights) != len(specs) or not sum(weights)):
        raise UserError(
            f"data.source_weights is {list(weights)}; {data.source} needs {len(specs)} weights, not all 0"
        )
    sources = [open_domain(spec, role="source", data_root=data.data_root) for spec in specs]
    target = open_domain(data.target, role="target", data_root=data.data_root)
    held_out = open_domain(data.target, role="evaluation", data_root=data.data_root, split=data.eval_split)
    for source in sources:
        check_apart(source, held_out)
    shared, targets = in_common_classes(
        sources, (target, held_out), classes=data.classes, aliases=data.class_alias
    )
    return RunDomains(shared, *targets)


def check_apart(source: Domain, held_out: Domain) -> None:
    """Check that no labelled training image is evaluated.

    The pseudo-labels of ``--stages`` pass: they are other label files, with links to the images.

    Raises:
        UserError: an image or a label is in both domains.
    """
    images = {item.image.absolute() for item in held_out.items}
    labels = [item.label for item in held_out.items if item.label]
    names, files = {label.name for label in labels}, {label.resolve() for label in labels}
    both = [
        image
        for image, label in source.items
        if image.absolute() in images or (label and label.name in names and label.resolve() in files)
    ]
    if both:
        raise UserError(
            f"{len(both)} of {len(source)} images of the source {source.name} (split {source.split}) are"
            f" evaluated, in {held_out.name} (split {held_out.split}); the first is {both[0]}: leave them out"
            " of the source, or evaluate another split with data.eval_split"
        )


def joined_classes(classes: Sequence[ClassSet]) -> ClassSet:
    """The classes of several domains, each name once, with its first colour.

    Raises:
        UserError: there are too many.
    """
    colours: dict[str, tuple[int, int, int]] = {}
    for one in classes:
        for name, colour in zip(one.names, one.palette, strict=True):
            colours.setdefault(name, colour)
    if len(colours) > UNKNOWN:
        raise UserError(f"the sources name {len(colours)} classes together; there can be {UNKNOWN}")
    return ClassSet(tuple(colours), tuple(colours.values()))


def mapping_of(data: DataConfig) -> ClassMapping:
    """The classes that all sources of a configuration together share with its target. Files need not exist.

    Raises:
        UserError: see :func:`~fastuda.data.domains.classes.class_mapping`.
    """
    source = joined_classes([classes_of(spec, "source") for spec in split_specs(data.source)])
    return class_mapping(source, classes_of(data.target, "target"), data.classes, data.class_alias)


def in_common_classes(
    sources: Sequence[Domain],
    targets: Sequence[Domain],
    *,
    classes: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
) -> tuple[tuple[Domain, ...], tuple[Domain, ...]]:
    """Sources and targets with train ids of the classes that they share by name.

    A class needs one source that has it. The classes have the order and names of the target. They are logged,
    as are those that are left out.

    Args:
        sources: the labelled domains.
        targets: splits of one target: first the one to train on, then those to evaluate, whose other classes
            become :attr:`Domain.others`.
        classes: names of the classes to keep.
        aliases: pairs ``target=source`` of names for the same class.

    Raises:
        UserError: a source shares no class with the target, or a name in ``classes`` or ``aliases`` is in no
            domain.
    """
    joined = joined_classes([source.classes for source in sources])
    mapping = class_mapping(joined, targets[0].classes, classes, aliases)
    for line in mapping.describe().splitlines():
        log.info("%s", line)
    renumbered = []
    for source in sources:
        ids = {i: joined.names.index(name) for i, name in enumerate(source.classes.names)}
        table = {i: mapping.source[j] for i, j in ids.items() if j in mapping.source}
        if not table:
            raise UserError(
                f"{source.name} has none of the classes {', '.join(mapping.shared.names)};"
                f" it has {', '.join(source.classes.names)}"
            )
        renumbered.append(source.renumber(mapping.shared, table))
    return tuple(renumbered), (
        targets[0].renumber(mapping.shared, mapping.target),
        *(held.renumber(mapping.shared, mapping.target, keep_others=True) for held in targets[1:]),
    )


def share_classes(
    source: Domain, *targets: Domain, classes: Sequence[str] | None = None, aliases: Sequence[str] = ()
) -> tuple[Domain, ...]:
    """:func:`in_common_classes` of a single source: the source, then the targets."""
    sources, shared = in_common_classes((source,), targets, classes=classes, aliases=aliases)
    return (*sources, *shared)
