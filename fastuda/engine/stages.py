"""Training in the three stages of FADA: source only, adversarial adaptation, self-distillation.

Every stage is a run folder of its own. Finished stages are skipped; interrupted ones, and ones with fewer
steps than requested, are resumed from their checkpoints.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from fastuda.config.schema import RunConfig, TrainConfig
from fastuda.data.config import DataConfig
from fastuda.data.domains.open import classes_of, open_domain
from fastuda.data.domains.run import mapping_of
from fastuda.engine.run import finished, supervised, train
from fastuda.errors import UserError
from fastuda.inference.prediction import describe, predict_files
from fastuda.inference.predictor import Predictor
from fastuda.inference.saved import load_run
from fastuda.inference.scores import Scores, table
from fastuda.system import distributed
from fastuda.system.files import clean, written
from fastuda.system.settings import build, merge, nest

log = logging.getLogger("fastuda")

STAGES = ("source", "adapt", "distill")


def stage_config(config: RunConfig, stage: str, out: Path) -> RunConfig:
    """The settings of one stage: the run's, updated with ``stages.<stage>``.

    Raises:
        UserError: ``stages`` names an unknown stage or setting.
    """
    unknown = set(config.stages) - set(STAGES)
    if unknown:
        raise UserError(f"stages has {sorted(unknown)}; there are {', '.join(STAGES)}")
    changes: dict[str, Any] = {"train": {"baseline": "off"}}
    if stage == "adapt":
        changes["model"] = {"weights": str(out / "1_source" / "model.safetensors")}
    if stage == "distill":
        changes["data"] = _labelled_target(config.data, out / "3_labels")
    own = config.stages.get(stage, {})
    if not isinstance(own, dict):
        raise UserError(f"stages.{stage} must be a section of settings, got {own!r}")
    over = merge(changes, nest(own))
    staged = build(RunConfig, merge(dataclasses.replace(config, stages={}).plain(), over), "")
    return staged if stage == "adapt" else supervised(staged, config)


def _labelled_target(data: DataConfig, labels: Path) -> dict[str, Any]:
    """Settings that make the pseudo-labelled target the source. It is read as the target was, and the run's
    classes are selected by the names in the target."""
    changes: dict[str, Any] = {
        "source": f"folder:{labels.resolve()}",
        "source_weights": None,
        "sampling": "uniform",
        "crop": data.target_crop or data.crop,
        "source_resize": data.target_resize,
        "source_size": data.target_size,
    }
    if data.class_alias or data.classes:
        target = classes_of(data.target, "target")
        mapping = mapping_of(data)
        names = mapping.shared.names
        pairs = [(target.names[theirs], names[ours]) for theirs, ours in mapping.target.items()]
        changes["classes"] = names
        changes["class_alias"] = tuple(f"{theirs}={ours}" for theirs, ours in pairs if theirs != ours)
    return changes


def train_stages(
    config: RunConfig, out: Path, *, resume: str | None = None, quiet: bool = False
) -> dict[str, Scores]:
    """Train all three stages into ``out``. Returns the scores by stage.

    1. ``1_source``: source_only.
    2. ``2_adapt``: the run's method, from the first stage's weights.
    3. ``3_labels``: the second stage's argmax on the target's training images, and ``3_distill``: source_only
       on them, from the run's own weights (FADA, train_self_distill.py: hard labels, no threshold).

    Args:
        config: the run; ``config.stages`` holds the settings that differ in a stage.
        out: folder of the stages; must be empty or absent, unless resuming.
        resume: ``auto`` to continue, or ``None``.
        quiet: no progress bar.

    Raises:
        UserError: the folder is not empty, a stage with later stages is to be continued, or a stage fails;
            see :func:`fastuda.engine.run.train`.
        Interrupted: the run was asked to stop.
    """
    if resume not in (None, "auto"):
        raise UserError("--stages continues with --resume auto, not from a single checkpoint")
    if resume is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out, or continue it with --resume auto")
    plan = {stage: stage_config(config, stage, out) for stage in STAGES}
    scores: dict[str, Scores] = {}
    for number, (stage, settings) in enumerate(plan.items(), 1):
        folder = out / f"{number}_{stage}"
        done = finished(folder, settings.train.steps)
        if done is None:
            if finished(folder) is not None:
                _check_last(folder, settings.train.steps, stage)
            if stage == "distill":
                write_pseudo_labels(out / "2_adapt", out / "3_labels", settings.train, quiet)
            log.info("stage %d of %d: %s", number, len(STAGES), stage)
            done = next(reversed(train(settings, folder, resume="auto", quiet=quiet).values()))
        scores[stage] = done
    if int(os.environ.get("RANK", 0)) == 0:
        with written(out / "table.txt", fsync=True) as draft:
            draft.write_text(table(scores) + "\n", encoding="utf-8")
    return scores


def _check_last(folder: Path, steps: int, stage: str) -> None:
    """Raises:
    UserError: a later stage started from the shorter training in ``folder``.
    """
    later = sorted(path.name for path in folder.parent.glob("[1-3]_*") if path.name[0] > folder.name[0])
    if later:
        raise UserError(
            f"{folder} ended before step {steps}, and {' and '.join(later)} started from its weights then:"
            f" remove them to train it further, or keep it with stages.{stage}.train.steps"
        )


def write_pseudo_labels(run: Path, out: Path, train: TrainConfig, quiet: bool = False) -> None:
    """Write a ``folder:`` data set of the run's target training images with the run's predictions as labels.

    Under torchrun each process predicts a share of the images.

    Args:
        run: the run folder.
        out: folder of the data set.
        train: gives the device and the timeout between processes.
        quiet: no progress bar.

    Raises:
        UserError: the run has not ended, or an image cannot be read.
    """
    world = distributed.start(train.device, train.timeout)
    try:
        if world.first:
            clean(out, recursive=True)
        if world.agree((out / "classes.yaml").is_file()):
            return
        config, method, classes = load_run(run, world.device)
        target = open_domain(config.data.target, role="target", data_root=config.data.data_root)
        own = range(world.rank, len(target), world.size)
        files = [(target.items[i].image, Path(f"{target.own_path(i)}.png")) for i in own]
        for image, name in files:
            _link(image, out / "images" / name.with_suffix(image.suffix))
        size, resampling = config.data.eval_size, config.data.resampling
        predictor = Predictor(method, classes, world.device, size, resampling=resampling)
        if files:
            predict_files(predictor, files, out, {"labels"}, quiet=quiet or not world.first, strict=True)
        world.barrier()
        if world.first:
            # written last: a data set without it is incomplete
            describe(out, classes)
    finally:
        distributed.stop()


def _link(source: Path, place: Path) -> None:
    """A symbolic link, or a copy if links are not possible."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        return
    try:
        place.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, place)
