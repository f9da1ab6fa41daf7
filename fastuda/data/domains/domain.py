"""A split of a data set: its images, and its labels as train ids."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from fastuda.data.domains.classes import canonical
from fastuda.data.domains.decode import (
    BadFile,
    draw_polygons,
    open_rgb,
    read_raw_label,
    stored_size,
    upright_size,
)
from fastuda.data.domains.layouts import Item
from fastuda.data.labels import IGNORE, UNKNOWN, ClassSet, LabelMap
from fastuda.errors import UserError

log = logging.getLogger("fastuda")


@dataclass(frozen=True)
class Domain:
    """Images and labels of one split of a data set.

    Labels are read as train ids of ``classes``; 255 is ignored. A file that cannot be used raises
    :class:`~fastuda.data.domains.decode.BadFile`, a ``UserError``.
    """

    name: str
    split: str
    root: Path
    items: list[Item]
    classes: ClassSet
    label_map: LabelMap
    fit_labels: bool = False
    """Resize labels whose size differs from their image's by up to 5 % instead of raising an error."""
    others: tuple[str, ...] = ()
    """Classes of an evaluated domain that the run does not train. Their pixels are labelled
    ``len(classes)``, so that scores count the predictions there."""
    assumed_void: bool = False
    """``classes.yaml`` sets neither ``ids`` nor ``ignore``, so 255 may be a class or void."""

    def __len__(self) -> int:
        return len(self.items)

    def short_name(self, index: int) -> str:
        """File name of an image without its suffix; with its folders if another image has the same name."""
        path = self.items[index].image
        unique = sum(item.image.stem == path.stem for item in self.items) == 1
        return path.stem if unique else "_".join(self.own_path(index).parts)

    def own_path(self, index: int) -> Path:
        """Path of an image in the data set without its suffix; with it if two images differ only in that."""
        path = self.items[index].image.relative_to(self.root)
        return path if self._paths[path.with_suffix("")] > 1 else path.with_suffix("")

    @cached_property
    def _paths(self) -> Counter[Path]:
        return Counter(item.image.relative_to(self.root).with_suffix("") for item in self.items)

    def renumber(self, classes: ClassSet, table: Mapping[int, int], *, keep_others: bool = False) -> Domain:
        """The same files with train ids of ``classes``, renumbered by ``table``.

        Classes that are not in the table are ignored, or become :attr:`others` if ``keep_others``.
        """
        lacking = (name for i, name in enumerate(self.classes.names) if i not in table)
        others = tuple(lacking) if keep_others else ()
        label_map = self.label_map.remap(table, len(classes) if others else IGNORE)
        return replace(self, classes=classes, label_map=label_map, others=others)

    def in_classes(self, classes: ClassSet, aliases: Sequence[str] = ()) -> tuple[Domain, tuple[str, ...]]:
        """The same files with train ids of ``classes``, and the names of ``classes`` that the domain has.

        Classes are matched by name. Those that are not in ``classes`` become :attr:`others`.

        Args:
            aliases: pairs ``target=source`` of names for the same class.

        Raises:
            UserError: the domain has none of the classes.
        """
        pairs = [alias.partition("=") for alias in aliases]
        synonyms = {canonical(target): canonical(source) for target, _, source in pairs}

        def key(name: str) -> str:
            return synonyms.get(canonical(name), canonical(name))

        numbers = {key(name): i for i, name in enumerate(classes.names)}
        keys = [key(name) for name in self.classes.names]
        table = {i: numbers[name] for i, name in enumerate(keys) if name in numbers}
        if not table:
            raise UserError(
                f"{self.name} has none of the classes {', '.join(classes.names)};"
                f" it has {', '.join(self.classes.names)}"
            )
        shared = tuple(name for i, name in enumerate(classes.names) if i in table.values())
        return self.renumber(classes, table, keep_others=True), shared

    def open_image(self, index: int) -> Image.Image:
        """Pillow image in 8-bit RGB."""
        return open_rgb(self.items[index].image)

    def read_image(self, index: int) -> np.ndarray:
        """RGB image ``uint8 [H, W, 3]``."""
        return np.asarray(self.open_image(index))

    def read_label(self, index: int) -> np.ndarray:
        """Train ids ``uint8 [H, W]``; 255 is ignored.

        Raises:
            BadFile: the label is missing, cannot be read, or holds a value that is not in the map.
        """
        image, path = self.items[index]
        if path is None:
            raise BadFile(image, f"has no label in {self.name}")
        if path.suffix == ".json":
            return draw_polygons(path, self.label_map.names, IGNORE)
        raw, palette = read_raw_label(path)
        if raw.ndim == 3 and not self.label_map.colors and not self.label_map.channel_zero:
            raise BadFile(
                path,
                f"is a colour picture; {self.name} expects label ids (one channel){self._hint('palette')}",
                fatal=True,
            )
        try:
            label = (
                self.label_map.decode(raw) if palette is None else self.label_map.decode_indexed(raw, palette)
            )
        except ValueError as error:
            hint = ", or leave palette out of classes.yaml to read numbers" if self.name == "folder" else ""
            raise BadFile(
                path, f"has a palette: {error}; save it as RGB to read colours{hint}", fatal=True
            ) from error
        if (label == UNKNOWN).any():
            values = self.label_map.unknown(raw)
            what = f"the colour {values[0]}" if isinstance(values[0], str) else f"label values {values[:5]}"
            hint = self._hint("palette" if isinstance(values[0], str) else "ids or ignore")
            raise BadFile(path, f"holds {what} that {self.name} does not define{hint}", fatal=True)
        return label

    def _hint(self, keys: str) -> str:
        return f"; if it is correct, add it to {keys} in classes.yaml" if self.name == "folder" else ""

    def read_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of the same size.

        Raises:
            BadFile: as :meth:`read_image` and :meth:`read_label`, or the sizes differ.
        """
        image = self.read_image(index)
        return image, self.fit(index, self.read_label(index), (image.shape[0], image.shape[1]))

    def fit(self, index: int, label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Label at the ``size`` (height, width) of its image.

        Raises:
            BadFile: its size differs, and by more than :attr:`fit_labels` allows.
        """
        if label.shape == size:
            return label
        near = all(abs(a - b) <= 0.05 * a for a, b in zip(size, label.shape, strict=True))
        if not (self.fit_labels and near):
            raise BadFile(
                self.items[index].label or "",
                f"is {label.shape[1]}x{label.shape[0]}, its image is {size[1]}x{size[0]}",
            )
        return np.asarray(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))

    def check_files(self, at_most: int = 10) -> None:
        """Read the header of every image and label, to find faults before training that would stop the
        evaluation.

        Raises:
            UserError: files are missing, empty, not images, or differ in size from their label.
        """
        bad = []
        for image, label in self.items:
            sizes: dict[Path, tuple[int, int]] = {}
            for path in (image, label):
                if path is None or path.suffix == ".json":
                    continue
                try:
                    with Image.open(path) as header:
                        sizes[path] = upright_size(header) if path == image else stored_size(header)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    empty = path.is_file() and path.stat().st_size == 0
                    bad.append(f"{path} cannot be read: {'it is empty' if empty else error}")
            if len(set(sizes.values())) > 1 and not self.fit_labels:
                with contextlib.suppress(BadFile):  # the orientation may follow the pixels
                    sizes[image] = open_rgb(image).size
                if len(set(sizes.values())) > 1:
                    bad.append(f"{label} differs in size from its image")
        if bad:
            more = f"\n  and {len(bad) - at_most} more" if len(bad) > at_most else ""
            raise UserError(
                f"{self.name} ({self.split}) is evaluated, which needs every file; repair or remove:\n  "
                + "\n  ".join(bad[:at_most])
                + more
            )

    def check_labels(self, count: int) -> None:
        """Read ``count`` labels spread over the domain to find a wrong label map before training.

        If they are all void, every label is read. Unreadable files raise no error: the loader may skip them.

        Raises:
            UserError: a value is not in the map, 255 may be a class or void, or no label shows any class.
        """
        labelled = [i for i, item in enumerate(self.items) if item.label is not None]
        sample = labelled[:: max(1, len(labelled) // max(count, 1))][:count]
        present = np.zeros(256, bool)
        for i in sample:
            present |= self._present(i)
        if self.assumed_void and self._raw_values(sample) == {0, IGNORE}:
            raise UserError(
                f"the labels of {self.root} hold only 0 and 255, and 255 is void unless classes.yaml"
                " says otherwise: write ids: [0, 255] if it is the second class, ignore: 255 if it is void"
            )
        for i in labelled if sample else ():
            if present[: len(self.classes)].any():
                break
            present |= self._present(i)
        if present.any() and not present[: len(self.classes)].any():
            raise UserError(
                f"no label of {self.name} in {self.root} (split {self.split}) has a pixel of"
                f" {', '.join(self.classes.names)}: all {len(labelled)} are void"
            )

    def _raw_values(self, indices: Sequence[int]) -> set[int]:
        """Raw ids in the readable labels; a label with colours counts as -1."""
        values: set[int] = set()
        for path in (self.items[i].label for i in indices):
            with contextlib.suppress(BadFile):
                if path is not None and path.suffix != ".json":
                    raw, _ = read_raw_label(path)
                    values |= set(np.unique(raw).tolist()) if raw.ndim == 2 else {-1}
        return values

    def _present(self, index: int) -> np.ndarray:
        """Whether each train id is in a label, bool [256]; all False if the loader may skip the label."""
        try:
            return np.bincount(self.read_label(index).ravel(), minlength=256) > 0
        except BadFile as bad:
            if bad.fatal:
                raise
            return np.zeros(256, bool)
