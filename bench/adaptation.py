"""Train every method on one pair of domains, from the same recipe and seeds, with a row per run.

The row of a run is appended to the CSV as soon as the run has ended. A run that has a row from any machine is
not trained again, so the table can grow over days: the same command trains the missing runs. An interrupted
run continues from its checkpoint under --runs. Without --method the whole table is trained, one seed after
another, with the most informative runs first. Minutes count only training steps, on whatever else the machine
was doing.

The recipe itself is not compared: after a change of the recipe, delete its old rows.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.gains import ABOUT, HERE, PAGE, SCORE, load, write
from bench.machine import commit, machine
from bench.rows import append_rows, check_rows
from fastuda import cli
from fastuda.config.schema import RunConfig
from fastuda.data.domains.run import open_run
from fastuda.engine.grid import one_of_many
from fastuda.engine.run import train
from fastuda.engine.trainer import Interrupted
from fastuda.errors import UserError
from fastuda.inference.saved import load_config
from fastuda.inference.scores import Scores
from fastuda.system.log import setup_logging
from fastuda.system.settings import parse_overrides

EXAMPLES = """\
  python -m bench.adaptation --config idda_cityscapes --weights mobilenet_v2.pth --amp \\
      --source folder:DIR/idda --target folder:DIR/cityscapes    the whole table: seed 0, then 1 and 2
  python -m bench.adaptation --config idda_cityscapes ... --seeds 0 --method plca method.lsr_weight=0
  python -m bench.adaptation --config idda_cityscapes ... --method source_only \\
      data.source=SOURCE,TARGET:few.txt data.source_weights=[1,1]    with the labels that few.txt lists
  python -m bench.adaptation --config idda_cityscapes ... --method weakseg \\
      method.weak_labels=points data.weak_labels=points.csv eval.logit_adjustment=0    with labelled points
  python -m bench.adaptation --table                             rewrite docs/results.md from bench/results"""

TABLE: tuple[tuple[str, str], ...] = (
    ("source_only", ""),
    ("self_training", ""),
    ("plca", ""),
    ("sepico", ""),
    ("source_only", "data.source=TARGET"),
    ("source_only", "method.lovasz_weight=0.75"),
    ("plca+self_training", ""),
    ("self_training", "method.mask_ratio=0.7 method.mask_block=32"),
    ("fada", ""),
    ("asanet", ""),
    ("weakseg", ""),
    ("plca", "method.test_aggregation=true"),
    ("plca", "method.lsr_weight=0"),
    ("plca", "method.lsr_weight=0 method.prediction_association=false"),
    ("plca", "method.aggregation=false method.test_aggregation=false"),
    ("plca", "method.contrast=false"),
)
"""Method and settings of every run, the most informative first. ``SOURCE`` and ``TARGET`` are the domains of
the command line. A network trained on the target's own labels is an upper bound for adaptation."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the table: its configuration and its folder."""

    method: str
    settings: str
    config: RunConfig
    out: Path

    @property
    def key(self) -> tuple[str, ...]:
        """The key that identifies a finished row."""
        return self.method, self.settings, str(self.config.train.seed), str(self.config.train.steps)


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """The same key, from a row."""
    return row["method"], row["settings"], row["seed"], row["steps"]


def columns(classes: Sequence[str]) -> tuple[str, ...]:
    """The header of a CSV: the description of the run, then the mIoU and a column per class."""
    return (*ABOUT, SCORE, *classes)


def minutes(out: Path) -> float:
    """Minutes of the training steps of a run, from its curves, without interruptions and evaluations."""
    total, last = 0.0, 0
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        for step, name, value in csv.reader(stream):
            if name == "perf/step_s":
                total += float(value) * (int(step) - last)
                last = int(step)
    return total / 60


def row_of(run: Run, scores: Scores, of: str) -> dict[str, object]:
    """The row of a run that has ended; ``of`` is the commit that the process began with."""
    config = run.config
    device = "cuda" if config.train.device.startswith("cuda") else "cpu"
    if config.train.device == "auto" and torch.cuda.is_available():
        device = "cuda"
    threads = "" if device == "cuda" else f" x{torch.get_num_threads()}"
    used = load_config(run.out).train.amp.removeprefix("force-")  # float32 if half precision is emulated
    precision = "float32" if used == "off" else used
    what = (*run.key, f"{minutes(run.out):.1f}", precision)
    where = (f"{machine(device)}{threads}", torch.__version__, of, datetime.date.today().isoformat())
    values = (f"{value:.2f}" for value in (scores.miou, *scores.iou))
    return dict(zip(columns(scores.classes), (*what, *where, *values), strict=True))


def _with_domains(setting: str, args: argparse.Namespace) -> str:
    """A setting with SOURCE and TARGET replaced by the domains of the command line."""
    return setting.replace("SOURCE", str(args.source)).replace("TARGET", str(args.target))


def runs_of(args: argparse.Namespace) -> list[Run]:
    """All requested runs, in their order.

    Raises:
        UserError: a method or a setting is unknown.
    """
    if args.method:
        chosen = [(method, args.overrides) for method in args.method]
    else:
        chosen = [(method, settings.split()) for method, settings in TABLE]
    if args.overrides and not args.method:
        raise UserError("settings are of the methods that --method names; name them")
    flags = {
        "data.source": args.source, "data.target": args.target, "model.weights": args.weights,
        "train.steps": args.steps, "train.amp": args.amp,
    }  # fmt: skip
    flags = {key: value for key, value in flags.items() if value is not None}
    runs = []
    for seed in args.seeds:
        for method, settings in chosen:
            given = parse_overrides([_with_domains(item, args) for item in settings])
            config = one_of_many(args.config, flags, given, method, seed)
            name = re.sub(r"[^\w.+=-]+", "_", " ".join((method, *settings)))
            out = args.runs / f"{name}_{config.train.steps}_{config.train.seed}"
            runs.append(Run(method, " ".join(settings), config, out))
    return runs


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("bench.adaptation", __doc__ or "", EXAMPLES)
    p.add_argument("--config", metavar="FILE|NAME", help="the recipe, as for fastuda.train")
    p.add_argument("--source", help="labelled domain, as for fastuda.train")
    p.add_argument("--target", help="unlabelled domain, as for fastuda.train")
    p.add_argument("--weights", help=".pth or .safetensors file to start from")
    p.add_argument("--method", action="append", metavar="NAME", help="repeatable (default: all in the table)")
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N",
        help="seeds, trained one after another (default: 0 1 2)",
    )  # fmt: skip
    p.add_argument(
        "--steps", type=cli.number(int, 1), metavar="N", help="optimiser steps (default: the recipe's)"
    )
    p.add_argument(
        "--amp", nargs="?", const="bf16", choices=cli.AMP_CHOICES,
        help="mixed precision; bf16 without a value (default: the recipe's)",
    )  # fmt: skip
    p.add_argument(
        "--runs", type=cli.a_path, default=Path("runs/adaptation"), metavar="DIR",
        help="folder of the run folders (default: runs/adaptation)",
    )  # fmt: skip
    p.add_argument(
        "--csv", type=cli.a_path, metavar="FILE",
        help="CSV with the rows, to which new ones are appended (default: bench/results/<config>.csv)",
    )  # fmt: skip
    p.add_argument("--table", action="store_true", help="train nothing, only rewrite docs/results.md")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings of --method's runs")
    return p


def main(go: Callable[..., dict[str, Scores]] = train) -> int:
    """Parse the command line, train the runs that have no row yet, and write the rows."""
    args = build_parser().parse_intermixed_args(cli.bare_amp(sys.argv[1:]))
    if args.table:
        write()
        print(f"wrote {PAGE}")
        return 0
    if args.config is None or args.target is None:
        raise UserError("--config and --target say what is trained")
    setup_logging(args.quiet)
    path = args.csv or HERE / "results" / f"{Path(args.config).stem}.csv"
    runs = runs_of(args)
    check_rows(path, columns(open_run(runs[0].config.data).classes.names))
    ready = {key_of(row) for row in load(path)}
    left = [run for run in runs if run.key not in ready]
    began = commit()
    print(f"{len(runs) - len(left)} of {len(runs)} runs have a row in {path}")
    for run in left:
        try:
            scores = go(run.config, run.out, resume="auto", quiet=args.quiet)[run.method]
        except Interrupted as stop:
            print(f"{stop} of {run.out}; go on with the same command")
            return 0
        row = row_of(run, scores, began)
        append_rows(path, list(row), [row])
        print(f"{' '.join(run.key)}: {SCORE} {scores.miou:.1f} after {row['minutes']} minutes")
        if path.resolve().parent == HERE / "results":
            write()
    return 0


if __name__ == "__main__":
    cli.run(main)
