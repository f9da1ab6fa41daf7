"""Score a finished run on a labelled split: IoU per class, and mIoU by both protocols."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from fastuda.cli import LESS_MEMORY, a_path, bare_amp, inference, inference_flags, number, parser, run
from fastuda.errors import UserError
from fastuda.system.paths import at_home

EXAMPLES = """\
  python -m fastuda.evaluate runs/plca
  python -m fastuda.evaluate runs/plca --target cityscapes:/data/cityscapes --split val --csv iou.csv
  python -m fastuda.evaluate runs/plca --scales 0.75 1 1.25 --flip
  python -m fastuda.evaluate runs/plca method.test_aggregation=false --json
  python -m fastuda.evaluate runs/fada/2_adapt --ccd
  python -m fastuda.evaluate runs/fada --target cross_city:/data/NTHU/Rome
  python -m fastuda.evaluate runs/plca --classes road sidewalk car
  python -m fastuda.evaluate runs/synthia_plca eval.protocol=confusion19

If the target lacks classes of the run, the other classes are scored, for example 13 of 19 on Cross-City.
If the run lacks classes of the target, as a run from SYNTHIA lacks terrain, truck and train, there are two
protocols: ignore leaves out the pixels of these classes (PLCA, FADA); confusion19 counts predictions there as
false positives (ASANet, WeakSegDA, SePiCo). The IoU per class uses eval.protocol. Means by the other protocol
have its name as a suffix."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.evaluate", __doc__ or "", EXAMPLES)
    p.add_argument("run", type=a_path, help="run folder with config.yaml and model.safetensors")
    p.add_argument("--target", type=at_home, help="domain to score on (default: the run's target)")
    p.add_argument("--split", help="split of the target (default: the run's data.eval_split)")
    p.add_argument("--classes", nargs="+", metavar="NAME", help="score these classes only (default: all)")
    p.add_argument("--data-root", type=at_home, help="folder of the domains that have no path")
    inference_flags(p)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument(
        "--pictures",
        type=number(int, 0),
        default=0,
        help="number of pictures to save in RUN/preds_<split> (default: 0)",
    )
    p.add_argument(
        "--ccd", action="store_true", help="also compute the class-centre distances of the features (FADA)"
    )
    p.add_argument(
        "--csv",
        type=a_path,
        help="write the scores to this CSV file: class, iou, iou by the other protocol if it differs, and ccd"
        " with --ccd",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    p.add_argument("--quiet", action="store_true", help="no progress bar, print only errors (and --json)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings of method.*, data.* or eval.*")
    return p


def main() -> int:
    """Parse, load, evaluate, print."""
    args = build_parser().parse_intermixed_args(bare_amp(sys.argv[1:]))

    from fastuda.data.domains.open import NO_SPLIT, open_domain
    from fastuda.inference.evaluation import evaluate
    from fastuda.inference.saved import load_run, override
    from fastuda.inference.scores import ccd_table, protocol_line, table, write_csv
    from fastuda.system import distributed
    from fastuda.system.log import setup_logging
    from fastuda.system.memory import memory_suffices

    setup_logging(quiet=True)
    world = distributed.start(args.device)
    config, method, classes = load_run(args.run, world.device)
    config = override(config, method, args.overrides)
    named = {"target": args.target, "eval_split": args.split, "data_root": args.data_root}
    data = dataclasses.replace(config.data, **{key: value for key, value in named.items() if value})
    if data.eval_split == NO_SPLIT:
        raise UserError(f"{args.run} was trained with data.eval_split={NO_SPLIT}: name a split with --split")
    domain = open_domain(data.target, role="evaluation", data_root=data.data_root, split=data.eval_split)
    domain, labelled = domain.in_classes(classes, data.class_alias)
    domain.check_labels(data.check_labels)
    missing = [name for name in classes.names if name not in labelled]
    if missing and world.first:
        print(f"not scored, {data.target} has no such class: {', '.join(missing)}", file=sys.stderr)
    folder = args.run / f"preds_{domain.split.replace('.', '_')}" if args.pictures else None
    how = inference(args, world.device)
    with memory_suffices(world.device, LESS_MEMORY):
        scores = evaluate(
            method, domain, data, world, how=how, pictures=folder, count=args.pictures,
            ccd=args.ccd, protocol=config.eval.protocol, quiet=args.quiet,
        ).only(tuple(dict.fromkeys(args.classes or labelled)))  # fmt: skip
    distributed.stop()
    if not world.first:
        return 0
    if args.json:
        print(json.dumps(scores.as_dict(), indent=1))
    elif not args.quiet:
        print(table({str(config.method["name"]): scores}))
        if scores.other_iou is not None:
            print(f"\n{protocol_line(scores, domain.others)}")
        if args.ccd:
            print(f"\n{ccd_table(scores)}")
    if args.csv:
        write_csv(args.csv, scores)
    return 0


if __name__ == "__main__":
    run(main)
