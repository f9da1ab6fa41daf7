"""Images per second of the loaders on large street photos, against the decoder alone.

    python -m bench.loader --photo PHOTO [--csv FILE]

Copies of one photo, shifted a little, are written as 2048 x 1024 JPEG and PNG with palette labels. Measured:
the decoder alone on one core (the floor), the torch and the DALI loader with the same number of processes,
and both on the copies that ``python -m fastuda.data cache`` makes. Every figure is the median of three runs
after a warm-up.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastuda.data.cache import CacheSettings, build_cache
from fastuda.data.config import DataConfig
from fastuda.data.dali_loader import DaliLoader, available
from fastuda.data.domains import Domain, open_domain
from fastuda.data.torch_loader import TorchLoader
from fastuda.models.weights import IMAGENET

SIZE = (2048, 1024)
RUNS = 3


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
    """Images per second that Pillow decodes from memory on one core, nothing else done."""
    data = [item.image.read_bytes() for item in domain.items]
    began = time.perf_counter()
    for encoded in data:
        Image.open(io.BytesIO(encoded)).load()
    return len(data) / (time.perf_counter() - began)


def loader_rate(kind: type[TorchLoader], domain: Domain, config: DataConfig, batches: int) -> float:
    """Images (source and target) per second of a loader in its stride."""
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


def measure(
    root: Path, photo: Image.Image, workers: int, count: int, batches: int
) -> list[dict[str, object]]:
    """All rows: what, file, crop, loader, images per second."""
    write_photos(root, photo, count)
    rows: list[dict[str, object]] = []

    def row(file: str, crop: int, loader: str, rate: float) -> None:
        rows.append({"file": file, "crop": crop, "loader": loader, "images_per_s": round(rate, 1)})
        print(
            f"{file.ljust(22)} {str(crop or '').rjust(5)}  {loader.ljust(14)} {rate:8.1f} images/s",
            flush=True,
        )

    loaders = {"torch": TorchLoader} | ({"dali-cpu": DaliLoader} if available() else {})
    for kind in ("jpg", "png"):
        domain = open_domain(f"gta5:{root / kind}", role="source", data_root=root)
        row(f"2048x1024 {kind}", 0, "decoder, 1 core", decode_rate(domain))
        for crop in (1024, 512):
            edges = (crop, round(1.3 * crop))
            config = DataConfig(
                crop=(crop, crop), source_resize=edges, target_resize=edges, batch_size=2, workers=workers
            )
            for name, loader in loaders.items():
                row(f"2048x1024 {kind}", crop, name, loader_rate(loader, domain, config, batches))
    original = open_domain(f"gta5:{root / 'png'}", role="source", data_root=root)
    build_cache(original, CacheSettings(root / "cache", 512, "jpg", 95), quiet=True)
    copies = open_domain(f"folder:{root / 'cache'}", role="source", data_root=root)
    config = DataConfig(
        crop=(512, 512), source_resize=(512, 666), target_resize=(512, 666), batch_size=2, workers=workers
    )
    for name, loader in loaders.items():
        row("1024x512 cached jpg", 512, name, loader_rate(loader, copies, config, batches))
    return rows


def main() -> int:
    """Parse, measure, print and write."""
    p = argparse.ArgumentParser(prog="python -m bench.loader", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--photo", type=Path, help="a street photo (default: noise with structure)")
    p.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    p.add_argument("--count", type=int, default=24, help="files of each kind (default: 24)")
    p.add_argument("--batches", type=int, default=8, help="batches of 2 + 2 images per run (default: 8)")
    p.add_argument("--csv", type=Path, help="write the rows here")
    args = p.parse_args()
    if args.photo:
        photo = Image.open(args.photo)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
        photo = Image.fromarray(noise)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), photo, args.workers, args.count, args.batches)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
