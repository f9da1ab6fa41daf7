"""Built-in street scenes in two domains with a domain gap, in the layouts of real data sets.

The ``synthetic`` scenes are clean, saturated and sunlit, seen from a high camera, in the layout of GTA5. The
``real`` scenes are drab, hazy, textured, noisy and blurred under changing light, seen from a low camera with
a longer lens, in the layout of Cityscapes.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastuda.data.labels import CITYSCAPES, CITYSCAPES_IDS
from fastuda.data.scenes.street import draw_scene
from fastuda.errors import UserError

VERSION = 1
MANIFEST = "scenes.json"
OWN = {MANIFEST, "gta5", "cityscapes", "source.png", "target.png"}
"""Everything in a folder of scenes, including contact sheets; a new drawing replaces it."""


@dataclass(frozen=True)
class ScenesConfig:
    """Number of scenes per split, their size, and the seed."""

    source: int = 400
    target: int = 400
    evaluation: int = 100
    height: int = 128
    width: int = 256
    seed: int = 0


def _jobs(root: Path, config: ScenesConfig) -> list[tuple[str, int, int, tuple[int, int], Path, Path]]:
    size, jobs = (config.height, config.width), []
    for index in range(config.source):
        name = f"{index + 1:05d}.png"
        images, labels = root / "gta5" / "images", root / "gta5" / "labels"
        jobs.append(("synthetic", config.seed, index, size, images / name, labels / name))
    for split, count, first in (("train", config.target, 0), ("val", config.evaluation, 1_000_000)):
        for index in range(count):
            stem = f"scenes_{index:06d}_000019"
            image = root / "cityscapes" / "leftImg8bit" / split / "scenes" / f"{stem}_leftImg8bit.png"
            label = root / "cityscapes" / "gtFine" / split / "scenes" / f"{stem}_gtFine_labelIds.png"
            jobs.append(("real", config.seed, first + index, size, image, label))
    return jobs


_TO_ID = np.zeros(256, np.uint8)
_TO_ID[: len(CITYSCAPES_IDS)] = CITYSCAPES_IDS
_ID_PALETTE = np.zeros((256, 3), np.uint8)
_ID_PALETTE[list(CITYSCAPES_IDS)] = CITYSCAPES.palette


def _write(job: tuple[str, int, int, tuple[int, int], Path, Path]) -> None:
    domain, seed, index, size, image_path, label_path = job
    image, labels = draw_scene(domain, seed, index, size)
    Image.fromarray(image).save(image_path, compress_level=1)
    picture = Image.fromarray(_TO_ID[labels])
    if domain == "synthetic":
        picture.putpalette(_ID_PALETTE.ravel().tolist())
    picture.save(label_path)


def _manifest(path: Path) -> dict[str, Any]:
    """Settings of the scenes in a folder; empty if there are none or they are incomplete."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def ensure_scenes(root: Path, config: ScenesConfig | None = None, *, quiet: bool = False) -> Path:
    """Draw both domains under ``root`` unless they exist with these settings; returns ``root``.

    The scenes are written beside ``root`` and renamed at the end, so an incomplete data set is never read.

    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    wanted = {"version": VERSION, **asdict(config or ScenesConfig())}

    def drawn() -> bool:
        present = _manifest(root / MANIFEST)
        return present == wanted or (config is None and present.get("version") == VERSION)

    try:
        root = root if root.name else root.resolve()
        if drawn():
            return root
        # without a manifest, gta5 and cityscapes may be the real data sets
        own = OWN if (root / MANIFEST).is_file() else set()
        strangers = sorted({path.name for path in root.iterdir()} - own) if root.exists() else []
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}") from error
    if strangers:
        raise UserError(
            f"{root} holds {strangers[0]}, which is not part of the scenes; choose another folder"
        )
    draft = root.with_name(f"{root.name}.part{os.getpid()}")
    try:
        jobs = _jobs(draft, config or ScenesConfig())
        for folder in {path.parent for job in jobs for path in job[4:]}:
            folder.mkdir(parents=True)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            written = pool.map(_write, jobs, chunksize=16)
            for _ in tqdm(written, total=len(jobs), desc="drawing scenes", unit="image", disable=quiet):
                pass
        (draft / MANIFEST).write_text(json.dumps(wanted), encoding="utf-8")
        if drawn():  # by another process meanwhile, which may read them already
            return root
        if root.exists():
            shutil.rmtree(root)
        draft.rename(root)
    except OSError as error:
        if drawn():  # by another process between the last two lines
            return root
        raise UserError(f"cannot write the scenes to {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root
