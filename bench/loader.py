"""Images per second of the loaders on large street photos, against the decoder alone.

Measured on slightly shifted copies of one photo, as 2048 x 1024 JPEG and PNG with palette labels: the
drawing of the built-in scenes and the decoder alone (the floor), each on one core; the torch and the DALI
loader with the same number of processes; and both on the copies made by ``python -m fastuda.data cache``.
A loader's figure is the median of three runs after a warm-up. Training steps of source_only on the
smallest network show the effect: the seconds that a step waits for its batch, and those of the whole step.
Other methods wait less.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.rows import say
from fastuda import cli
from fastuda.config.resolve import resolve
from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import open_rgb
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.dali_loader import DaliLoader, available
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.data.scenes.street import draw_scene
from fastuda.data.tools.cache import CacheSettings, build_cache
from fastuda.engine.trainer import Trainer
from fastuda.errors import UserError
from fastuda.models.normalization import IMAGENET
from fastuda.system import distributed
from fastuda.system.settings import plain

SIZE = (2048, 1024)
RUNS = 3
ROWS = {False: 8, True: 13}
"""Rows without DALI and with it."""
EXAMPLES = """\
  python -m bench.loader --photo street.jpg --csv loader.csv
  python -m bench.loader --workers 0 --count 8 --batches 2    # a quick look"""
COLUMNS = ("file", "crop", "loader", "images_per_s", "wait_s", "step_s")


def write_photos(root: Path, photo: Image.Image, count: int) -> None:
    """``root/jpg`` and ``root/png`` in GTA5's layout."""
    photo = photo.convert("RGB").resize(SIZE, Image.Resampling.BILINEAR)
    for kind in ("jpg", "png"):
        for folder in ("images", "labels"):
            (root / kind / folder).mkdir(parents=True)
        for i in range(count):
            moved = photo.transform(SIZE, Image.Transform.AFFINE, (1, 0, 7 * i, 0, 1, 3 * i))
            moved.save(root / kind / "images" / f"{i}.{kind}", **({"quality": 95} if kind == "jpg" else {}))
            blocks = np.random.default_rng(i).choice(np.array([7, 11, 26], np.uint8), (32, 64))
            label = Image.fromarray(np.kron(blocks, np.ones((32, 32), np.uint8)))
            label.putpalette(list(range(256)) * 3)
            label.save(root / kind / "labels" / f"{i}.png")


def decode_rate(domain: Domain) -> float:
    """Images per second that Pillow decodes from memory on one core."""
    data = [item.image.read_bytes() for item in domain.items]
    began = time.perf_counter()
    for encoded in data:
        Image.open(io.BytesIO(encoded)).load()
    return len(data) / (time.perf_counter() - began)


def drawing_rate(count: int) -> float:
    """Scenes of the built-in domains drawn per second on one core."""
    began = time.perf_counter()
    for index in range(count):
        draw_scene(("synthetic", "real")[index % 2], 0, index, (128, 256))
    return count / (time.perf_counter() - began)


def loader_rate(kind: type[TorchLoader], domain: Domain, config: DataConfig, batches: int) -> float:
    """Source and target images per second of a warmed-up loader."""
    loader = kind(domain, domain, config, IMAGENET, seed=0)
    for _ in range(3 * max(config.workers, 1)):
        next(loader)
    rates = []
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(batches):
            next(loader)
        rates.append(2 * config.batch_size * batches / (time.perf_counter() - began))
    loader.close()
    return statistics.median(rates)


def data_wait(name: str, source: str, config: DataConfig, steps: int) -> tuple[float, float]:
    """Median seconds that a training step waits for its batch, and of the whole step."""
    chosen = {f"data.{key}": value for key, value in plain(dataclasses.asdict(config)).items()}
    chosen |= {
        "data.source": source, "data.target": source, "data.eval_split": "none", "data.loader": name,
        "data.check_labels": 1, "method.name": "source_only", "model.backbone": "small",
        "train.device": "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(resolve("scenes", chosen, {}), Path(out), distributed.start("cpu"), quiet=True)
        run.method.train()
        means = []
        for _ in range(steps + 2 * max(config.workers, 1)):
            run.step()
            means.append(run.take_means())
        run.loader.close()
    timed = means[-steps:]  # earlier steps get batches that were read while the workers started
    return tuple(statistics.median(step[f"perf/{key}"] for step in timed) for key in ("data_s", "step_s"))


Row = tuple[str, int, str, float, str, str]


def measure(root: Path, photo: Image.Image, workers: int, count: int, batches: int) -> Iterator[Row]:
    """Yield all rows: file, crop, loader, images per second, and the seconds that a step waits and takes."""
    write_photos(root, photo, count)
    loaders = {"torch": TorchLoader} | ({"dali-cpu": DaliLoader} if available() else {})

    def all_loaders(file: str, source: str, crop: int) -> Iterator[Row]:
        domain = open_domain(source, role="source", data_root=root)
        edges = (crop, round(1.3 * crop))
        config = DataConfig(
            crop=(crop, crop), source_resize=edges, target_resize=edges, batch_size=2, workers=workers
        )
        for name, loader in loaders.items():
            rate = loader_rate(loader, domain, config, batches)
            wait, step = data_wait(name.partition("-")[0], source, config, batches)
            yield file, crop, name, round(rate, 1), f"{wait:.3f}", f"{step:.3f}"

    yield "256x128 scene", 0, "drawn, 1 core", round(drawing_rate(2 * count), 1), "", ""
    for kind in ("jpg", "png"):
        domain = open_domain(f"gta5:{root / kind}", role="source", data_root=root)
        yield f"2048x1024 {kind}", 0, "decoder, 1 core", round(decode_rate(domain), 1), "", ""
        for crop in (1024, 512):
            yield from all_loaders(f"2048x1024 {kind}", f"gta5:{root / kind}", crop)
    original = open_domain(f"gta5:{root / 'png'}", role="source", data_root=root)
    build_cache(original, CacheSettings(root / "cache", 512, "jpg", 95), quiet=True)
    yield from all_loaders("1024x512 cached jpg", f"folder:{root / 'cache'}", 512)


def line_of(row: Row) -> str:
    """A row as one line of text."""
    file, crop, name, rate, wait, step = row
    waits = f", a step waits {wait} s of {step} s" if wait else ""
    return f"{file:22} {crop or '':5}  {name:15} {rate:8.1f} images/s{waits}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.loader", __doc__ or "", EXAMPLES)
    p.add_argument(
        "--photo", type=cli.a_path, metavar="FILE", help="a street photo (default: noise with structure)"
    )
    p.add_argument(
        "--workers", type=cli.number(int, 0), default=2, metavar="N", help="loader processes (default: 2)"
    )
    p.add_argument(
        "--count", type=cli.number(int, 1), default=24, metavar="N", help="files of each kind (default: 24)"
    )
    p.add_argument(
        "--batches",
        type=cli.number(int, 1),
        default=8,
        metavar="N",
        help="batches of 2 + 2 images per run (default: 8)",
    )
    p.add_argument("--csv", type=cli.a_path, metavar="FILE", help="write the rows to this CSV, replacing it")
    return p


def main() -> int:
    """Parse, measure, print and write."""
    args = build_parser().parse_args()
    if args.photo:
        photo = open_rgb(args.photo)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
        photo = Image.fromarray(noise)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        table = None
        if args.csv:
            try:
                args.csv.parent.mkdir(parents=True, exist_ok=True)
                table = csv.writer(
                    stack.enter_context(open(args.csv, "w", newline="", buffering=1, encoding="utf-8"))
                )
                table.writerow(COLUMNS)
            except OSError as error:
                raise UserError(f"cannot write {args.csv}: {error.strerror}") from error
        rows = measure(Path(folder), photo, args.workers, args.count, args.batches)
        for row in tqdm(rows, total=ROWS[available()], unit="row", disable=None):
            say(line_of(row))
            if table:
                table.writerow(row)
    return 0


if __name__ == "__main__":
    cli.run(main)
