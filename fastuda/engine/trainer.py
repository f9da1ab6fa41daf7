"""The training loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastuda.config.schema import RunConfig
from fastuda.data.domains.open import absolute
from fastuda.data.loading.augment import jitter_source
from fastuda.data.loading.batch import Batch
from fastuda.data.loading.torch_loader import workers_alive
from fastuda.engine import checkpoint, setup
from fastuda.engine.curves import CsvLogger, Loggers, RunningMeans, TensorBoardLogger
from fastuda.engine.guard import LossGuard
from fastuda.engine.optim import lr_factor, set_lr
from fastuda.engine.parallel import Parallel
from fastuda.engine.state import BEST, LAST, RunState
from fastuda.errors import UserError
from fastuda.inference.evaluation import Stopped, evaluate
from fastuda.inference.predictor import Predictor, leave_pictures
from fastuda.inference.saved import save_model
from fastuda.inference.scores import Scores
from fastuda.inference.windows import Inference
from fastuda.methods.base import phases_of
from fastuda.models.build import described
from fastuda.system.ddp import bare
from fastuda.system.distributed import World
from fastuda.system.files import clean, written
from fastuda.system.log import progress
from fastuda.system.memory import peak_memory
from fastuda.system.precision import DTYPES
from fastuda.system.random import seed_everything

log = logging.getLogger("fastuda")


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint has been written."""


class Trainer:
    """One run in one folder. :meth:`fit` trains it, from a checkpoint if one is given."""

    def __init__(
        self, config: RunConfig, out: Path, world: World, *, resume: Path | None = None, quiet: bool = False
    ):
        # a run can be evaluated or resumed from any folder
        config = dataclasses.replace(config, data=absolute(config.data))
        begun = None if resume is None else checkpoint.load(resume)
        asked = config.train.amp
        config = setup.with_precision(config, world, begun)
        with world.first_goes_ahead():  # the first process may have to fetch files
            config = dataclasses.replace(config, model=described(config.model))
        self.domains = setup.open_domains(config.data, world)
        config = setup.with_class_shares(config, self.domains, world)
        self.config, self.out, self.world, self.quiet = config, out, world, quiet
        self.amp = DTYPES[config.train.amp.removeprefix("force-")]
        self.method = setup.build_method(config, self.domains.classes.names, world, begun is None)
        self.input = self.method.model.input
        self.networks = self.method.networks()
        self.settings = {name: config.optim.of(name) for name in self.networks}
        self.optimizers = setup.build_optimizers(self.settings, self.networks)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        self.loader = setup.build_run_loader(config, self.domains, self.method, world)
        self.means = RunningMeans(world)
        self.guard = LossGuard(out, eager=world.device.type == "cpu", scaler=self.scaler)
        self.stop_signal = 0
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        self.state = RunState(
            config, world, self.method, self.optimizers, self.scaler, self.loader, self.means, asked
        )
        if resume is not None and begun is not None:
            self.state.restore(begun, resume)
        else:
            # the weights above are the same on every rank; from here on each rank draws its own numbers
            seed_everything(config.train.seed * 1000 + world.rank)
        self.resumed = resume is not None
        if config.train.compile:
            self.method.model.compile()
        self.parallel = Parallel(self.method, self.networks, world)

    @workers_alive()
    def fit(self) -> Scores:
        """Train to the last step, evaluate, and save the weights.

        Raises:
            UserError: a loss is not finite, too many files are unreadable, the disk is full, a loader
                process died.
            Interrupted: SIGTERM or SIGINT was received; a checkpoint was written.
        """
        config, world, state = self.config, self.world, self.state
        loggers = self._loggers()
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        title = str(config.method["name"])
        bar = progress(config.train.steps, state.step, title, self.quiet or not world.first)
        if config.train.compile:
            bar.set_postfix_str("compiling")  # until the first losses are shown
        try:
            self.method.train()
            while state.step < config.train.steps:
                logging_now = False
                if not state.owed:
                    self.step()
                    world.beat(state.step)
                    bar.update()
                    logging_now = state.step % config.log.every == 0 or state.step == config.train.steps
                done = state.step == config.train.steps
                if logging_now:
                    self.guard.check()
                    values = self.take_means()
                    loggers.log(state.step, values)
                    bar.set_postfix({"loss": f"{values['train/loss']:.3f}"}, refresh=False)
                due = config.eval.every and state.step % config.eval.every == 0 and not done
                if state.owed or due:
                    state.owed = True
                    self._evaluate(loggers)
                if (config.checkpoint.every and state.step % config.checkpoint.every == 0) or done:
                    self._checkpoint(LAST, loggers)
                # this needs a device sync with several ranks, so it is done only with the curves
                if (world.size == 1 or logging_now) and world.any(bool(self.stop_signal)):
                    self._stop(loggers)
            bar.close()
            curves, best = loggers.size(), state.best
            scores = self._evaluate(loggers, pictures=True)
            if state.best != best:
                # a resumed run continues from here; the rows of this evaluation are written again
                state.save(self.out / "checkpoints", LAST, curves)
            self._finish(scores)
            return scores
        finally:
            bar.close()
            loggers.close()
            self.loader.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def step(self) -> None:
        """One optimiser step of every network."""
        began = time.perf_counter()
        config, state = self.config, self.state
        for name, optimizer in self.optimizers.items():
            set_lr(optimizer, lr_factor(self.settings[name], state.step, config.train.steps))
            optimizer.zero_grad(set_to_none=True)
        waited = 0.0
        for _ in range(config.train.accumulate):
            asked = time.perf_counter()
            batch = next(self.loader).to(self.world.device, non_blocking=True)
            waited += time.perf_counter() - asked
            self._backward(jitter_source(batch, config.data, self.input))
        self.parallel.reduce()
        stepped = False
        for name, optimizer in self.optimizers.items():
            if all(p.grad is None for p in self.networks[name].parameters()):
                continue  # no phase of this step trained it
            stepped = True
            limit = self.settings[name].clip_norm
            if limit is not None:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.networks[name].parameters(), limit)
            self.scaler.step(optimizer)
        if stepped:
            self.scaler.update()
        self.method.after_step(state.step)
        self.parallel.share_statistics()
        state.step += 1
        self.means.steps += 1
        self.means.add("perf/data_s", waited)
        self.means.add("perf/step_s", time.perf_counter() - began)

    def _backward(self, batch: Batch) -> None:
        """Run the phases of one batch, each with its backward."""
        share = 1 / self.config.train.accumulate
        total: Tensor | float = 0.0
        for phase in self._phases(batch):
            self.guard.watch(self.state.step, phase.losses, batch)
            loss = torch.stack([value.float() for value in phase.losses.values()]).sum()
            self.scaler.scale(loss * share).backward()
            self.parallel.after(phase.net)
            total = total + loss.detach()
            for name, value in {**phase.losses, **phase.metrics}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                self.means.add(f"train/{name}", value * share)
        self.means.add("train/loss", total * share)

    def _phases(self, batch: Batch) -> Iterator[Any]:
        """The method's phases, each computed under autocast. The backward runs without autocast."""
        phases = phases_of(self.method, batch, self.state.step)
        while True:
            self.parallel.before()
            with torch.autocast(self.world.device.type, dtype=self.amp, enabled=self.amp is not None):
                try:
                    phase = next(phases, None)
                except ValueError as error:
                    if "more than 1 value per channel" in str(error):
                        self._too_small(batch)
                    raise
            if phase is None:
                return
            yield phase

    def _too_small(self, batch: Batch) -> NoReturn:
        """Raise the error for batch norm that gets a single value per channel."""
        height, width = batch.source_image.shape[2:]
        least = 2 * bare(self.method.model).stride
        raise UserError(
            f"batch norm needs two values of a channel, and a batch of {len(batch.source_image)} crops of"
            f" {height} x {width} leaves one: raise data.crop and data.target_crop to {least} x {least} at"
            " least, or data.batch_size to 2"
        )

    def take_means(self) -> dict[str, float]:
        """Means of losses and metrics over the steps since the last call, by the names of the curves."""
        values = self.means.take()
        if self.scaler.is_enabled():
            values["train/loss_scale"] = self.scaler.get_scale()
        values["perf/peak_mib"] = peak_memory(self.world.device)
        return values | {f"lr/{name}": o.param_groups[0]["lr"] for name, o in self.optimizers.items()}

    def _evaluate(self, loggers: Loggers, pictures: bool = False) -> Scores:
        folder = self.out / "preds" if pictures else None
        try:
            scores = evaluate(
                self.method,
                self.domains.held_out,
                self.config.data,
                self.world,
                how=Inference(amp=self.amp),
                pictures=folder,
                count=self.config.eval.pictures,
                protocol=self.config.eval.protocol,
                stop=lambda: bool(self.stop_signal),
                quiet=self.quiet or not pictures,  # during training its own bar is shown
            )
        except Stopped:
            self._stop(loggers)
        self.state.owed = False
        if folder and not len(self.domains.held_out) and self.config.eval.pictures and self.world.first:
            self._look(folder)
        per_class = dict(zip(scores.classes, scores.iou, strict=True))
        values = {f"val/{key}": value for key, value in scores.protocols().items() if value == value}
        values |= {f"iou/{name}": value for name, value in per_class.items() if value == value}
        loggers.log(self.state.step, values)
        if len(self.domains.held_out):
            where = f"{self.domains.held_out.name} ({self.domains.held_out.split})"
            where += "" if scores.other_iou is None else f", by {scores.protocol}"
            log.info("step %d: mIoU %.2f on %s", self.state.step, scores.miou, where)
        if scores.miou > self.state.best:
            self.state.best = scores.miou
            self._checkpoint(BEST, loggers)
        return scores

    def _look(self, folder: Path) -> None:
        """Save pictures of training images, if there are no held-out ones."""
        how = Inference(amp=self.amp)
        size = self.config.data.eval_size
        self.method.eval()
        predictor = Predictor(
            self.method, self.domains.classes, self.world.device, size, how, self.config.data.resampling
        )
        leave_pictures(predictor, self.domains.target, folder, self.config.eval.pictures)
        self.method.train()

    def _stop(self, loggers: Loggers) -> NoReturn:
        self._checkpoint(LAST, loggers)
        raise Interrupted(f"stopped at step {self.state.step}")

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_signal = number

    def _loggers(self) -> Loggers:
        if not self.world.first:
            return Loggers()
        (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        clean(self.out)
        clean(self.out / "checkpoints")
        with written(self.out / "config.yaml", fsync=True) as draft:
            draft.write_text(self.config.to_yaml(), encoding="utf-8")
        state = self.state
        loggers: list[CsvLogger | TensorBoardLogger] = [CsvLogger(self.out / "metrics.csv", state.curves)]
        if self.config.log.tensorboard:
            loggers.append(TensorBoardLogger(self.out / "tb", state.step if self.resumed else None))
        return Loggers(*loggers)

    def _checkpoint(self, name: str, loggers: Loggers) -> None:
        self.guard.check()
        self.guard.check_weights(self.state.step, self.networks)
        self.state.save(self.out / "checkpoints", name, loggers.size())

    def _finish(self, scores: Scores) -> None:
        if not self.world.first:
            return
        save_model(self.out / "model.safetensors", bare(self.method.model), self.domains.classes)
        held_out = self.domains.held_out
        result = {"step": self.state.step, "target": held_out.name, "split": held_out.split}
        result["processes"] = self.world.size
        result |= scores.as_dict() | {"classes": list(scores.classes)}
        with written(self.out / "result.json", fsync=True) as draft:
            draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
