"""Train a segmenter on a labelled source and an unlabelled target.

With nothing but a method it draws the built-in street scenes, trains source_only and the method, and prints
both."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from fastuda.cli import a_path, parser, run
from fastuda.errors import UserError

EXAMPLES = """\
  python -m fastuda.train --method plca --amp
  python -m fastuda.train --method plca --source gta5:/data/gta5 --target cityscapes:/data/cityscapes \\
      --config gta5_cityscapes_plca --weights resnet101.pth --out runs/plca
  python -m fastuda.train --resume auto --out runs/plca
  python -m fastuda.train --method plca optim.lr=1e-3 method.lovasz_weight=0 eval.every=500
  python -m fastuda.train --method source_only,plca --seeds 0 1 2 --amp --out runs/grid
  torchrun --nproc-per-node 2 -m fastuda.train --method plca --amp"""

FLAGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "method": ("method.name", "name of a method, several joined by +, or package.module:Class", {}),
    "source": ("data.source", "labelled domain: name or name:path[:split]; scenes is built in", {}),
    "target": ("data.target", "unlabelled domain, likewise", {}),
    "data_root": ("data.data_root", "where domains without a path lie (default: data)", {}),
    "model": ("model.head", "segmentation head: deeplabv2, daformer or auto", {}),
    "backbone": ("model.backbone", "resnet18/34/50/101, mobilenet_v2, vgg16, mit_b0 to mit_b5, small", {}),
    "weights": ("model.weights", ".pth or .safetensors file to start from", {}),
    "crop": ("data.crop", "training crop", {"nargs": 2, "type": int, "metavar": ("H", "W")}),
    "batch_size": ("data.batch_size", "images of each domain, per process and backward pass", {"type": int}),
    "steps": ("train.steps", "optimiser steps; with --stages, of each", {"type": int}),
    "lr": ("optim.lr", "learning rate", {"type": float}),
    "amp": ("train.amp", "mixed precision; bf16 without a value",
            {"nargs": "?", "const": "bf16", "choices": ["bf16", "fp16", "off"]}),
    "device": ("train.device", "auto, cpu, cuda, cuda:N", {}),
    "seed": ("train.seed", "of weights, samples and augmentation", {"type": int}),
    "loader": ("data.loader", "auto, torch or dali", {}),
    "workers": ("data.workers", "loader processes", {"type": int}),
}  # fmt: skip
"""Flag to the dotted setting that it stands for, its help, and how it is read."""


def bare_amp(words: list[str]) -> list[str]:
    """``--amp key=value`` with the precision that argparse would take ``key=value`` for."""
    out = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        out.append("--amp=bf16" if word == "--amp" and "=" in after else word)
    return out


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.train", __doc__ or "", EXAMPLES)
    for name, (_, text, more) in FLAGS.items():
        p.add_argument(f"--{name.replace('_', '-')}", help=text, **more)
    p.add_argument(
        "--seeds", type=int, nargs="+", metavar="N",
        help="a run per seed (and per method of --method a,b) into folders under --out, then a comparison",
    )  # fmt: skip
    p.add_argument("--out", type=a_path, help="run folder (default: runs/<source>_<target>_<method>_<time>)")
    p.add_argument(
        "--resume", metavar="auto|PATH", help="go on from --out's checkpoint, or from a checkpoint file"
    )
    p.add_argument(
        "--config", metavar="FILE|NAME", help="YAML file, or one that is shipped (see --list-configs)"
    )
    p.add_argument(
        "--list-configs", action="store_true", help="print the names of the shipped configurations"
    )
    p.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    p.add_argument(
        "--stages", action="store_true",
        help="three runs in one: source only, the method from its weights, and self-distillation (FADA);"
        " flags and key=value hold for each, stages.STAGE.train.steps=N for one: source, adapt or distill",
    )  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress bar, warnings only")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of --print-config, dotted")
    return p


def main() -> int:
    """Parse, resolve, train, print the table."""
    args = build_parser().parse_intermixed_args(bare_amp(sys.argv[1:]))

    from fastuda.config import resolve, shipped
    from fastuda.loggers import setup_logging
    from fastuda.metrics import table
    from fastuda.runs import default_folder, train
    from fastuda.settings import parse_overrides
    from fastuda.stages import train_stages
    from fastuda.trainer import Interrupted

    if args.list_configs:
        print("\n".join(shipped()))
        return 0
    first = int(os.environ.get("RANK", 0)) == 0  # under torchrun, one process speaks
    setup_logging(args.quiet or not first)
    if args.seeds or "," in (args.method or ""):
        return _grid(args)
    given = {name: getattr(args, name) for name in FLAGS}
    flags = {FLAGS[name][0]: value for name, value in given.items() if value is not None}
    saved = args.out / "config.yaml" if args.out and args.resume == "auto" else None
    if args.config is None and saved is not None and saved.is_file():
        args.config = str(saved)  # the run goes on as it began
    config = resolve(args.config, flags, parse_overrides(args.overrides))
    if args.print_config:
        print(config.to_yaml(), end="")
        return 0
    if args.resume == "auto" and args.out is None:
        raise UserError("--resume auto needs --out, the folder of the run to go on with")
    out = args.out or default_folder(config)
    try:
        go = train_stages if args.stages else train
        scores = go(config, out, resume=args.resume, quiet=args.quiet)
    except Interrupted as stop:
        if first:
            stages = " --stages" if args.stages else ""
            print(f"{stop}; go on with --resume auto --out {out}{stages}")
        return 0
    if first:
        last = out / "3_distill" if args.stages else out
        page = last / "report.html"
        look = f"open {page}" if page.is_file() else f"pictures in {last / 'preds'}"
        scored = any(value == value for one in scores.values() for value in one.iou)
        said = table(scores) if scored else "no scores: the target has no held-out labels"
        print(f"{said}\n\nrun folder: {out} ({look})")
    return 0


def _grid(args: argparse.Namespace) -> int:
    """Every method with every seed, one after another; runs that have ended are left alone."""
    from fastuda.compare import markdown, read_groups, write
    from fastuda.config import resolve
    from fastuda.runs import train
    from fastuda.settings import merge, parse_overrides
    from fastuda.trainer import Interrupted

    if args.out is None:
        raise UserError("--seeds and --method a,b need --out, the folder of all their runs")
    if args.stages or args.resume not in (None, "auto"):
        raise UserError("--seeds and --method a,b go with neither --stages nor a checkpoint file")
    runs = []
    for method in [None] if args.method is None else args.method.split(","):
        for seed in args.seeds or [args.seed]:
            chosen = {"method": method, "seed": seed}
            values = {name: chosen.get(name, getattr(args, name)) for name in FLAGS}
            flags = {FLAGS[name][0]: value for name, value in values.items() if value is not None}
            given = parse_overrides(args.overrides)
            config = resolve(args.config, flags, merge({"train": {"baseline": "off"}}, given))
            name = str(config.method["name"])
            runs.append((config, args.out / f"{name.replace(':', '.')}_{config.train.seed}"))
    if args.print_config:
        print("\n---\n".join(config.to_yaml() for config, _ in runs), end="")
        return 0
    for config, out in runs:
        try:
            train(config, out, resume="auto", quiet=args.quiet)
        except Interrupted as stop:
            print(f"{stop} of {out}; go on with the same command")
            return 0
    groups = read_groups([args.out])
    write(groups, args.out)
    print(f"{markdown(groups)}written to {args.out / 'comparison.html'}")
    return 0


if __name__ == "__main__":
    run(main)
