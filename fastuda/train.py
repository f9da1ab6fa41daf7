"""Train a segmenter on a labelled source and an unlabelled target.

With --method alone it draws the built-in street scenes, trains source_only and the method on them, and prints
the scores of both."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastuda.cli import FLAGS, a_path, bare_amp, flag_settings, parser, run, setting_flag
from fastuda.errors import UserError
from fastuda.system.paths import at_home

if TYPE_CHECKING:
    from fastuda.inference.scores import Scores

EXAMPLES = """\
  python -m fastuda.train --method plca --amp
  python -m fastuda.train --method plca --source gta5:/data/gta5 --target cityscapes:/data/cityscapes \\
      --config gta5_cityscapes_plca --weights resnet101.pth --out runs/plca
  python -m fastuda.train --resume auto --out runs/plca
  python -m fastuda.train --method plca optim.lr=1e-3 method.lovasz_weight=0 eval.every=500
  python -m fastuda.train --method source_only,plca --seeds 0 1 2 --amp --out runs/grid
  torchrun --nproc-per-node 2 -m fastuda.train --method plca --amp"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.train", __doc__ or "", EXAMPLES)
    for name in FLAGS:
        setting_flag(p, name)
    p.add_argument(
        "--seeds", type=int, nargs="+", metavar="N",
        help="train one run per seed (and per method of --method a,b) in folders in --out, and compare them",
    )  # fmt: skip
    p.add_argument("--out", type=a_path, help="run folder (default: runs/<source>_<target>_<method>_<time>)")
    p.add_argument(
        "--resume", metavar="auto|PATH", type=at_home,
        help="continue from the last checkpoint in --out, or from a checkpoint file",
    )  # fmt: skip
    p.add_argument(
        "--config", metavar="FILE|NAME", type=at_home,
        help="YAML file, or the name of a shipped configuration (see --list-configs)",
    )  # fmt: skip
    p.add_argument(
        "--list-configs", action="store_true", help="print the names of the shipped configurations"
    )
    p.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    p.add_argument(
        "--stages", action="store_true",
        help="train three runs: source only, the method from its weights, and self-distillation (FADA);"
        " flags and key=value apply to all three, stages.STAGE.key=value to one (source, adapt or distill)",
    )  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress bar, warnings only")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of --print-config")
    return p


def main() -> int:
    """Parse, resolve, train, print the scores."""
    args = build_parser().parse_intermixed_args(bare_amp(sys.argv[1:]))

    from fastuda.config.resolve import resolve, shipped
    from fastuda.engine.grid import plan, train_grid
    from fastuda.engine.run import default_folder, train
    from fastuda.engine.stages import train_stages
    from fastuda.engine.trainer import Interrupted
    from fastuda.report.comparison import markdown
    from fastuda.system.log import setup_logging
    from fastuda.system.settings import parse_overrides

    if args.list_configs:
        print("\n".join(shipped()))
        return 0
    first = int(os.environ.get("RANK", 0)) == 0  # under torchrun only one process prints
    setup_logging(args.quiet or not first)
    overrides = parse_overrides(args.overrides)
    if args.seeds or "," in (args.method or ""):
        if args.out is None:
            raise UserError("--seeds and --method a,b need --out, the folder of all their runs")
        if args.stages or args.resume not in (None, "auto"):
            raise UserError("--seeds and --method a,b cannot be combined with --stages or a checkpoint file")
        methods = [None] if args.method is None else args.method.split(",")
        flags = flag_settings(args, without=("method", "seed"))
        runs = plan(methods, args.seeds or [args.seed], args.out, args.config, flags, overrides)
        if args.print_config:
            print("\n---\n".join(config.to_yaml() for config, _ in runs), end="")
            return 0
        try:
            groups = train_grid(runs, args.out, quiet=args.quiet)
        except Interrupted as stop:
            print(f"{stop}; continue with the same command")
            return 0
        print(f"{markdown(groups)}written to {args.out / 'comparison.html'}")
        return 0
    if args.config is None and args.resume == "auto" and args.out and (args.out / "config.yaml").is_file():
        args.config = str(args.out / "config.yaml")  # a resumed run keeps its settings
    config = resolve(args.config, flag_settings(args), overrides)
    if args.print_config:
        print(config.to_yaml(), end="")
        return 0
    if args.resume == "auto" and args.out is None:
        raise UserError("--resume auto needs --out, the folder of the run to continue")
    out = args.out or default_folder(config)
    try:
        scores = (train_stages if args.stages else train)(config, out, resume=args.resume, quiet=args.quiet)
    except Interrupted as stop:
        if first:
            stages = " --stages" if args.stages else ""
            print(f"{stop}; continue with --resume auto --out {out}{stages}")
        return 0
    if first:
        print(summary(scores, out, out / "3_distill" if args.stages else out))
    return 0


def summary(scores: dict[str, Scores], out: Path, last: Path) -> str:
    """The table of the scores, the run folder, and what to open in ``last``, the folder of the last run."""
    from fastuda.inference.scores import table

    page = last / "report.html"
    hint = f"open {page}" if page.is_file() else f"pictures in {last / 'preds'}"
    has_scores = any(value == value for one in scores.values() for value in one.iou)
    text = table(scores) if has_scores else "no scores: the target has no held-out labels"
    text += f"\n\nrun folder: {out} ({hint})"
    pictures = sorted((last / "preds").glob("*.png"))
    if pictures:
        text += f"\npicture to open: {pictures[0]} (image, prediction, label)"
    return text


if __name__ == "__main__":
    run(main)
