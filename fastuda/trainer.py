"""The loop: batches in, phases of losses backwards, networks stepped; curves, checkpoints and scores out."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastuda import checkpoint
from fastuda.config import RunConfig
from fastuda.data.batch import Batch
from fastuda.data.domains import open_domain, share_classes
from fastuda.data.torch_loader import build_loader
from fastuda.distributed import World
from fastuda.errors import UserError
from fastuda.evaluation import evaluate
from fastuda.loggers import CsvLogger, Loggers, TensorBoardLogger, add_log_file, progress
from fastuda.methods import get_method
from fastuda.metrics import Scores
from fastuda.models import build_model
from fastuda.optim import build_optimizer, lr_factor, network_config, set_lr
from fastuda.saved import save_model

log = logging.getLogger("fastuda")

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Trainer:
    """One run in one folder. ``fit()`` trains from where the folder's checkpoint left off, if asked to
    resume."""

    def __init__(
        self, config: RunConfig, out: Path, world: World, *, resume: Path | None = None, quiet: bool = False
    ):
        self.config, self.out, self.world, self.quiet = config, out, world, quiet
        if config.train.amp not in AMP:
            raise UserError(f"train.amp is {config.train.amp!r}: choose off, bf16 or fp16")
        if config.train.amp == "fp16" and world.device.type != "cuda":
            raise UserError("fp16 with a loss scaler needs a CUDA device; use --amp bf16 here")
        self.amp = AMP[config.train.amp]
        root = config.data.data_root
        source = open_domain(config.data.source, role="source", data_root=root)
        target = open_domain(config.data.target, role="target", data_root=root)
        held_out = open_domain(
            config.data.target, role="evaluation", data_root=root, split=config.data.eval_split
        )
        for domain in (source, held_out):
            domain.check_labels(config.data.check_labels)
        self.source, self.target, self.held_out = share_classes(
            source, target, held_out, classes=config.data.classes, aliases=config.data.class_alias
        )

        checkpoint.seed_everything(config.train.seed)
        classes = len(self.source.classes)
        model = build_model(config.model, classes)
        method = get_method(config.method["name"])(config.method_config(), model, classes)
        self.method = method.to(world.device)
        self.networks = self.method.networks()
        settings = {name: network_config(config.optim, name) for name in self.networks}
        self.settings = settings
        for setting in settings.values():
            lr_factor(setting, 0, config.train.steps)
        self.optimizers = {name: build_optimizer(settings[name], net) for name, net in self.networks.items()}
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        self.loader = build_loader(
            self.source,
            self.target,
            config.data,
            model.input,
            seed=config.train.seed,
            rank=world.rank,
            world=world.size,
            pin=world.device.type == "cuda",
        )
        self.step = 0
        self.best = -math.inf
        self.sums: dict[str, Tensor] = {}
        self.counted = 0
        self.stop_signal = 0
        if resume is not None:
            self._restore(resume)
        else:
            # every rank draws its own randomness from here on; the weights above were drawn alike
            checkpoint.seed_everything(config.train.seed * 1000 + world.rank)
        self.resumed = resume is not None
        if world.size > 1:
            self._wrap()

    def _wrap(self) -> None:
        """A DDP wrap around each network, put where the method calls it."""
        for name, net in self.networks.items():
            wrapped = DistributedDataParallel(net, broadcast_buffers=False)
            self.networks[name] = wrapped
            for attribute, module in list(self.method.named_children()):
                if module is net:
                    setattr(self.method, attribute, _CallsThrough(wrapped))

    def fit(self) -> Scores:
        """Train to the last step, evaluate, and leave the weights.

        Raises:
            UserError: a loss is not finite, too many files are unreadable, the disk is full.
            Interrupted: SIGTERM or SIGINT came; a checkpoint was written.
        """
        config, world = self.config, self.world
        loggers = self._loggers()
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        title = str(config.method["name"])
        bar = progress(config.train.steps, self.step, title, self.quiet or not world.first)
        try:
            self.method.train()
            while self.step < config.train.steps:
                self._train_step()
                bar.update()
                done = self.step == config.train.steps
                if self.step % config.log.every == 0 or done:
                    values = self._take_means()
                    loggers.log(self.step, values)
                    bar.set_postfix({"loss": f"{values['train/loss']:.3f}"}, refresh=False)
                if config.eval.every and self.step % config.eval.every == 0 and not done:
                    self._evaluate(loggers)
                if (config.checkpoint.every and self.step % config.checkpoint.every == 0) or done:
                    self._checkpoint("last.pt")
                if world.any(bool(self.stop_signal)):
                    self._checkpoint("last.pt")
                    raise Interrupted(f"stopped at step {self.step} by signal {self.stop_signal}")
            bar.close()
            scores = self._evaluate(loggers, pictures=True)
            self._finish(scores)
            return scores
        finally:
            bar.close()
            loggers.close()
            self.loader.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _train_step(self) -> None:
        """One optimiser step of every network."""
        began = time.perf_counter()
        config = self.config
        for name, optimizer in self.optimizers.items():
            set_lr(optimizer, lr_factor(self.settings[name], self.step, config.train.steps))
            optimizer.zero_grad(set_to_none=True)
        for micro in range(config.train.accumulate):
            batch = next(self.loader).to(self.world.device, non_blocking=True)
            self._count("perf/data_s", torch.tensor(time.perf_counter() - began))
            self._backward(batch, last=micro + 1 == config.train.accumulate)
        for name, optimizer in self.optimizers.items():
            limit = self.settings[name].clip_norm
            if limit is not None:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.networks[name].parameters(), limit)
            self.scaler.step(optimizer)
        self.scaler.update()
        self.method.after_step(self.step)
        self.step += 1
        self.counted += 1
        self._count("perf/step_s", torch.tensor(time.perf_counter() - began))

    def _backward(self, batch: Batch, last: bool) -> None:
        """The phases of one batch; DDP reduces in the last batch's phases only."""
        total: Tensor | None = None
        phases = self._phases(batch)
        for phase in phases:
            loss = torch.stack([value.float() for value in phase.losses.values()]).sum()
            if not torch.isfinite(loss):
                self._refuse(phase.losses, batch)
            net = self.networks[phase.net]
            quiet = net.no_sync() if isinstance(net, DistributedDataParallel) and not last else None
            with quiet or contextlib.nullcontext():
                self.scaler.scale(loss / self.config.train.accumulate).backward()
            total = loss.detach() if total is None else total + loss.detach()
            for name, value in {**phase.losses, **phase.metrics}.items():
                self._count(f"train/{name}", value.detach() / self.config.train.accumulate)
        if total is not None:
            self._count("train/loss", total / self.config.train.accumulate)

    def _phases(self, batch: Batch) -> Iterator[Any]:
        """The method's phases, each computed under autocast; the backward runs outside of it."""
        phases = self.method.phases(batch, self.step)
        while True:
            with torch.autocast(self.world.device.type, dtype=self.amp, enabled=self.amp is not None):
                phase = next(phases, None)
            if phase is None:
                return
            yield phase

    def _refuse(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Stop on a loss that is not finite, naming the term and the files."""
        values = {name: value.item() for name, value in losses.items()}
        broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        files = "\n  ".join([*batch.source_files, *batch.target_files])
        raise UserError(
            f"step {self.step}: the loss is not finite ({', '.join(broken) or values});"
            f" lower optim.lr or use --amp off. The last checkpoint is untouched. The batch:\n  {files}"
        )

    def _count(self, name: str, value: Tensor) -> None:
        value = value.float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _take_means(self) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks."""
        names = sorted(self.sums)
        stacked = torch.stack([self.sums[name].to(self.world.device) for name in names])
        means = self.world.sum(stacked) / (self.world.size * self.counted)
        self.sums, self.counted = {}, 0
        values = dict(zip(names, means.tolist(), strict=True))
        for name, optimizer in self.optimizers.items():
            values[f"lr/{name}"] = optimizer.param_groups[0]["lr"]
        return values

    def _evaluate(self, loggers: Loggers, pictures: bool = False) -> Scores:
        folder = self.out / "preds" if pictures else None
        scores = evaluate(
            self.method,
            self.held_out,
            self.config.data,
            self.world,
            amp=self.amp,
            pictures=folder,
            count=self.config.eval.pictures,
        )
        per_class = dict(zip(scores.classes, scores.iou, strict=True))
        values = {f"val/{key}": value for key, value in scores.protocols().items()}
        values |= {f"iou/{name}": value for name, value in per_class.items() if value == value}
        loggers.log(self.step, values)
        log.info(
            "step %d: mIoU %.2f on %s (%s)", self.step, scores.miou, self.held_out.name, self.held_out.split
        )
        if scores.miou > self.best:
            self.best = scores.miou
            self._checkpoint("best.pt")
        return scores

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_signal = number

    def _loggers(self) -> Loggers:
        if not self.world.first:
            return Loggers()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "checkpoints").mkdir(exist_ok=True)
        checkpoint.write_atomic(
            self.out / "config.yaml", lambda draft: draft.write_text(self.config.to_yaml())
        )
        add_log_file(self.out / "log.txt")
        at = self.step if self.resumed else None
        loggers: list[CsvLogger | TensorBoardLogger] = [CsvLogger(self.out / "metrics.csv", at)]
        if self.config.log.tensorboard:
            loggers.append(TensorBoardLogger(self.out / "tb", at))
        return Loggers(*loggers)

    def _method_state(self) -> dict[str, Tensor]:
        return {key.replace("wrapped.module.", ""): value for key, value in self.method.state_dict().items()}

    def _checkpoint(self, name: str) -> None:
        everyone = self.world.gather({"rng": checkpoint.rng_state(), "sums": self._partial_sums()})
        if not self.world.first:
            return
        checkpoint.save(
            self.out / "checkpoints" / name,
            {
                "step": self.step,
                "best": self.best,
                "config": self.config.plain(),
                "method": self._method_state(),
                "optimizers": {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
                "scaler": self.scaler.state_dict(),
                "loader": self.loader.state_dict(),
                "ranks": everyone,
            },
        )

    def _partial_sums(self) -> dict[str, Any]:
        return {"counted": self.counted, "sums": {key: value.cpu() for key, value in self.sums.items()}}

    def _restore(self, path: Path) -> None:
        state = checkpoint.load(path)
        if state["config"]["method"]["name"] != self.config.method["name"]:
            theirs = state["config"]["method"]["name"]
            raise UserError(f"{path} is of method {theirs!r}, this run is {self.config.method['name']!r}")
        if len(state["ranks"]) != self.world.size:
            raise UserError(
                f"{path} was written by {len(state['ranks'])} processes and this run has {self.world.size};"
                " resume with as many: samples and random numbers are dealt out by rank"
            )
        try:
            self.method.load_state_dict(state["method"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit this configuration: {first}") from error
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.step, self.best = state["step"], state["best"]
        own = state["ranks"][self.world.rank]
        self.sums = {key: value.to(self.world.device) for key, value in own["sums"]["sums"].items()}
        self.counted = own["sums"]["counted"]
        checkpoint.set_rng_state(own["rng"])
        log.info("resumed from %s at step %d", path, self.step)

    def _finish(self, scores: Scores) -> None:
        if not self.world.first:
            return
        model = self.method.model
        plain = model.wrapped.module if isinstance(model, _CallsThrough) else model
        save_model(self.out / "model.safetensors", plain, self.source.classes)
        result = {"step": self.step, "target": self.held_out.name, "split": self.held_out.split}
        result |= scores.as_dict() | {"classes": list(scores.classes)}
        text = json.dumps(result, indent=1)
        checkpoint.write_atomic(self.out / "result.json", lambda draft: draft.write_text(text))


class _CallsThrough(nn.Module):
    """A DDP wrap that still shows the attributes and methods of the network inside."""

    def __init__(self, wrapped: DistributedDataParallel):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            wrapped: Any = super().__getattr__("wrapped")
            return getattr(wrapped.module, name)
