"""bf16 and fp16 against float32, method by method, on the scenes: ``python -m tests.engine.precision``.

Trains each method on tiny crops from one seed in float32 and in half precision, and compares the mean losses
of every 50 steps. The band is 0.1, or as far as float32 drifts from itself where its weights begin 0.1%
apart, if that is more: the confidence of a teacher decides between steps that differ by much. fp16 has a
fixed loss scale of 16384, which overflows nowhere here; its convolutions have no kernels on a CPU, so that it
takes many times as long. Exit code 1 where a mean is outside of the band.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastuda.data.scenes import ScenesConfig, ensure_scenes
from fastuda.engine.trainer import Trainer
from fastuda.methods import METHODS
from tests.engine.runs import trainer

# the heads beside the segmentor, narrow: what they compute is the same
NARROW = {
    "asanet": {"width": 16},
    "fada": {"width": 16},
    "sepico": {"width": 16, "contrast_start": 20, "tau": 0.1},
    "weakseg": {"category_width": 16},
}
SCALE = 2.0**14
WINDOW = 50
BAND = 0.1
"""Of the mean loss over 50 steps, at least."""
APART = 1e-3


def tiny(root: Path, out: Path, method: str, amp: str) -> Trainer:
    """Of one method on crops of 32 x 32."""
    settings = [(f"method.{key}", value) for key, value in NARROW.get(method, {}).items()]
    images = 2 if method in ("self_training", "sepico") else 1
    settings += [("data.crop", [32, 32]), ("data.batch_size", images), ("train.steps", 200)]
    run = trainer(
        root, out, ("method.name", method), ("train.amp", amp if amp == "off" else f"force-{amp}"), *settings
    )
    if amp == "fp16":
        run.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6)
        run.guard.scaler = run.state.scaler = run.scaler
    return run


@torch.no_grad()
def nudge(run: Trainer, seed: int) -> Trainer:
    """Every weight times ``1 + APART z``, z normal."""
    generator = torch.Generator().manual_seed(seed)
    for network in run.method.networks().values():
        for weight in network.parameters():
            weight.mul_(1 + APART * torch.randn(weight.shape, generator=generator))
    return run


def losses(run: Trainer, steps: int) -> torch.Tensor:
    """The loss of every step."""
    found = []
    for _ in range(steps):
        run.step()
        found.append(run.take_means()["train/loss"])
    return torch.tensor(found)


def drift(exact: torch.Tensor, half: torch.Tensor, window: int = WINDOW) -> float:
    """The largest difference of a window's mean loss, relative where that is above 1: SePiCo's regulariser is
    negative and brings the sum near 0. A rest that fills no window is left out."""
    whole = len(exact) // window * window
    a, b = (x[:whole].unflatten(0, (-1, window)).mean(1) for x in (exact, half))
    return ((b - a).abs() / a.abs().clamp(min=1)).max().item()


def main() -> int:
    """Parse, train, compare, print a row each."""
    p = argparse.ArgumentParser(
        prog="python -m tests.engine.precision", description=(__doc__ or "").splitlines()[0]
    )
    p.add_argument(
        "--method", action="append", choices=sorted(METHODS), help="repeatable (default: every one)"
    )
    p.add_argument("--amp", action="append", choices=("bf16", "fp16"), help="repeatable (default: both)")
    p.add_argument("--steps", type=int, default=200, help=f"a multiple of {WINDOW} (default: 200)")
    args = p.parse_args()
    if args.steps < WINDOW or args.steps % WINDOW:
        p.error(f"--steps must be a multiple of {WINDOW}")
    outside = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ensure_scenes(
            root / "scenes", ScenesConfig(source=8, target=8, evaluation=3, height=32, width=64), quiet=True
        )
        for method in args.method or sorted(METHODS):
            exact = losses(tiny(root, root / "run", method, "off"), args.steps)
            band = BAND
            for seed in range(8):
                apart = nudge(tiny(root, root / "run", method, "off"), seed)
                band = max(band, drift(exact, losses(apart, args.steps)))
            for amp in args.amp or ("bf16", "fp16"):
                began = time.perf_counter()
                found = drift(exact, losses(tiny(root, root / "run", method, amp), args.steps))
                outside += not found <= band
                taken = time.perf_counter() - began
                print(
                    f"{method:14} {amp} {args.steps} steps: within {found:.4f} of float32,"
                    f" band {band:.2f} ({taken:.0f} s)",
                    flush=True,
                )
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
