"""Trains a configuration into a run folder, and the source-only baseline beside it if requested."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from fastuda.config.schema import RunConfig
from fastuda.data.domains.open import only_scenes, split_specs
from fastuda.engine.environment import environment
from fastuda.engine.state import newest
from fastuda.engine.trainer import Trainer
from fastuda.errors import UserError, cannot_write
from fastuda.inference.saved import read_result, scores_of
from fastuda.inference.scores import Scores, table
from fastuda.methods import BASELINE, get_method
from fastuda.report.page import write_report
from fastuda.system import distributed
from fastuda.system.files import written
from fastuda.system.log import kept_lines, log_file
from fastuda.system.memory import memory_suffices
from fastuda.system.settings import build

log = logging.getLogger("fastuda")

LESS_MEMORY = (
    "lower --batch-size (and raise train.accumulate to make up for it), lower --crop, or train with --amp"
)


def default_folder(config: RunConfig) -> Path:
    """``runs/<source>_<target>_<method>_<time>``."""
    source = "+".join(spec.partition(":")[0] for spec in split_specs(config.data.source))
    target = config.data.target.partition(":")[0]
    method = str(config.method["name"]).replace(":", ".")
    return Path("runs") / f"{source}_{target}_{method}_{time.strftime('%Y%m%d-%H%M%S')}"


def wants_baseline(config: RunConfig) -> bool:
    """Whether to train the baseline as well."""
    choice = config.train.baseline
    if config.method["name"] == BASELINE or choice == "off":
        return False
    return choice == "on" or only_scenes(config.data.source)


def supervised(run: RunConfig, of: RunConfig) -> RunConfig:
    """``run`` with the baseline method: the supervised objective of ``of``'s method without the
    adaptation."""
    settings = build(get_method(BASELINE).Config, of.method_config().supervised(), "method")
    return dataclasses.replace(run, method={"name": BASELINE, **dataclasses.asdict(settings)})


def finished(out: Path, steps: int = 0) -> Scores | None:
    """The scores of a run that finished after at least ``steps`` steps, else None."""
    path = out / "result.json"
    if not path.is_file() or not (out / "model.safetensors").is_file():
        return None
    try:
        result = read_result(path)
        return None if result["step"] < steps else scores_of(result)
    except (UserError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%r): the run is scored again", path, error.__cause__ or error)
        return None


def train(
    config: RunConfig, out: Path, *, resume: str | None = None, quiet: bool = False
) -> dict[str, Scores]:
    """Train into ``out``. Returns the scores by method name, the baseline first if it was trained.

    Args:
        config: the run.
        out: its folder; must be empty or absent, unless resuming.
        resume: ``auto`` (from the folder's own checkpoint, if it has one), or the path of a checkpoint.
        quiet: no progress bar.

    Raises:
        UserError: see :class:`~fastuda.engine.trainer.Trainer`; or the folder holds a run already.
        Interrupted: the run was asked to stop.
    """
    if resume is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out, or continue it with --resume auto")
    if resume not in (None, "auto"):
        given = Path(str(resume))
        if not given.is_file():
            raise UserError(f"no checkpoint at {resume}; --resume takes auto or a file")
        if given.resolve().parent.parent != out.resolve() and out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} holds another run than {resume}; choose another --out")
    world = distributed.start(config.train.device, config.train.timeout)
    try:
        out = world.agree(out)
        scores = {}
        name = str(config.method["name"])
        with memory_suffices(world.device, LESS_MEMORY):
            if wants_baseline(config):
                base = supervised(config, config)
                scores[BASELINE] = _one(base, out / BASELINE, world, resume and "auto", quiet)
            scores[name] = _one(config, out, world, resume, quiet)
        if world.first:
            with written(out / "table.txt", fsync=True) as draft:
                draft.write_text(table(scores) + "\n", encoding="utf-8")
        return scores
    except OSError as error:
        raise cannot_write(error.filename or out, error) from error
    except RuntimeError as error:
        if world.size > 1 and "imed out" in str(error):
            raise UserError(
                f"rank {world.rank} waited train.timeout={config.train.timeout:g} s;"
                f" nothing came from {world.silent()}"
            ) from error
        raise
    finally:
        distributed.stop()


def _one(config: RunConfig, out: Path, world: distributed.World, resume: str | None, quiet: bool) -> Scores:
    done = finished(out, config.train.steps) if resume == "auto" else None
    if done is not None:
        log.info("%s is finished", out)
        if not (out / "report.html").is_file():
            _report(config, out, world)
        return done
    start = Path(resume) if resume not in (None, "auto") else None
    if resume == "auto":
        start = world.agree(newest(out / "checkpoints"))
    with kept_lines() as lines:
        trainer = Trainer(config, out, world, resume=start, quiet=quiet)
    if not world.first:
        scores = trainer.fit()
    else:
        out.mkdir(parents=True, exist_ok=True)
        with log_file(out / "log.txt", lines):
            with written(out / "env.txt", fsync=True) as draft:
                draft.write_text(environment(), encoding="utf-8")
            scores = trainer.fit()
            _report(config, out, world)
    world.barrier()  # no rank leaves the group while the first one writes
    return scores


def _report(config: RunConfig, out: Path, world: distributed.World) -> None:
    """Write report.html. A failure is logged and does not fail the run."""
    if config.log.report and world.first:
        try:
            write_report(out, str(world.device))
        except Exception as error:
            log.warning("%s has no report (%s); try python -m fastuda.report %s", out, error, out)
