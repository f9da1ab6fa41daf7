"""Measure the time of a training step by part: data, backbone, heads, ops, optimiser, rest.

Accepts the settings of fastuda.train, trains a few steps without a run folder, and prints one row per
method."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from fastuda.cli import FLAGS, a_path, bare_amp, flag_settings, number, parser, run, setting_flag
from fastuda.errors import UserError
from fastuda.system.paths import at_home

EXAMPLES = """\
  python -m fastuda.profile --method plca --amp
  python -m fastuda.profile --method all --crop 256 512 --batch-size 2 --workers 0
  python -m fastuda.profile --method fada,sepico --json > profile.json
  python -m fastuda.profile --config runs/plca/config.yaml --trace plca.json

Open the trace in chrome://tracing or ui.perfetto.dev. The rest is augmentation, weight averaging, checks and
copies, and on a GPU also the time in which no kernel runs."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.profile", __doc__ or "", EXAMPLES)
    for name in FLAGS:
        if name == "method":
            text = "name of a method, several separated by commas, or all (default: the configuration's)"
            setting_flag(p, name, text)
        elif name == "steps":
            text = "number of steps to time, first without and then with the profiler (default: 5)"
            setting_flag(p, name, text, type=number(int, 1), default=5)
        else:
            setting_flag(p, name)
    p.add_argument(
        "--config",
        metavar="FILE|NAME",
        type=at_home,
        help="YAML file, or the name of a shipped configuration",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    p.add_argument("--trace", type=a_path, metavar="FILE", help="write a Chrome trace of one method")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of fastuda.train")
    return p


def main() -> int:
    """Parse, resolve, profile, print."""
    args = build_parser().parse_intermixed_args(bare_amp(sys.argv[1:]))

    from fastuda.config.resolve import resolve
    from fastuda.engine.profiling import profile_step, table
    from fastuda.engine.trainer import Trainer
    from fastuda.methods import METHODS
    from fastuda.system import distributed
    from fastuda.system.log import setup_logging
    from fastuda.system.settings import parse_overrides

    setup_logging(quiet=True)
    names = list(METHODS) if args.method == "all" else args.method.split(",") if args.method else [None]
    if args.trace and len(names) > 1:
        raise UserError("--trace takes a single --method")
    world = distributed.start(args.device or "auto")
    if world.size > 1:
        raise UserError("fastuda.profile runs in one process: start it without torchrun")
    profiles = []
    for name in names:
        chosen = flag_settings(args, without=("method", "steps"))
        chosen |= {} if name is None else {"method.name": name}
        config = resolve(args.config, chosen, parse_overrides(args.overrides))
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(config, Path(folder), world)
            try:
                profiles.append(profile_step(trainer, steps=args.steps, trace=args.trace))
                config = trainer.config  # with the precision that is used
            finally:
                trainer.loader.close()
    if args.json:
        about: dict[str, object] = {"device": str(world.device), "machine": platform.machine()}
        about |= {"crop": list(config.data.crop), "batch_size": config.data.batch_size}
        about |= {"amp": config.train.amp}
        print(json.dumps({**about, "profiles": [one.as_dict() for one in profiles]}, indent=1))
    else:
        print(table(profiles))
    return 0


if __name__ == "__main__":
    run(main)
