"""The steps that build a run, in the trainer's order. They share the random number generators, so a different
order gives different initial weights."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastuda.config.schema import OptimConfig, RunConfig
from fastuda.data.config import DataConfig
from fastuda.data.domains.classes import positions
from fastuda.data.domains.run import RunDomains, open_run
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.sampling import source_index, source_shares
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.engine.optim import build_optimizer
from fastuda.engine.parallel import sync_batch_norm
from fastuda.methods import Method, get_method
from fastuda.models import build_model
from fastuda.models.build import ModelConfig, in_layout, weights_path
from fastuda.models.norms import fuse_norms
from fastuda.system.distributed import World
from fastuda.system.memory import keep_freed_memory
from fastuda.system.precision import choose
from fastuda.system.random import seed_everything

log = logging.getLogger("fastuda")


def with_precision(config: RunConfig, world: World, checkpoint: dict[str, Any] | None = None) -> RunConfig:
    """The configuration with the requested precision replaced by the one that the run uses.

    A run that continues from ``checkpoint`` keeps its precision, unless the user now requests another one
    than when it began. A new measurement must not change the precision between two steps.
    """
    asked = config.train.amp
    if checkpoint is not None:
        used = checkpoint.get("config", {}).get("train", {}).get("amp")
        if used is not None and asked in (used, checkpoint.get("asked_amp")):
            return config.with_train(amp=used)
    chosen = world.agree(choose(asked, world.device, "train.amp"))
    return config.with_train(amp=asked if asked.startswith("force-") else chosen)


def open_domains(data: DataConfig, world: World) -> RunDomains:
    """Sources, target and held-out images, with the classes that they share.

    Raises:
        UserError: a domain cannot be read, shares no class with the others, or has wrong labels; or an image
            of a source is held out.
    """
    with world.first_goes_ahead():  # the first process may have to draw the scenes
        domains = open_run(data)
    for domain in (*domains.sources, domains.held_out):
        domain.check_labels(data.check_labels)
    domains.held_out.check_files()
    return domains


def with_class_shares(config: RunConfig, domains: RunDomains, world: World) -> RunConfig:
    """The configuration with the share of each class among the labelled pixels of the sources, each source
    weighted by its share of the draws, if ``eval.logit_adjustment`` needs them.

    Raises:
        UserError: see :func:`~fastuda.data.loading.sampling.source_index`.
    """
    if not config.eval.logit_adjustment or config.eval.class_shares is not None:
        return config
    weights = source_shares(domains.sources, config.data)
    with world.first_goes_ahead():  # the first process writes the index
        frequencies = [source_index(source, config.data).frequency for source in domains.sources]
    shares = np.average(frequencies, axis=0, weights=weights)
    return dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, class_shares=tuple(shares.tolist()))
    )


def classifier_rows(model: ModelConfig, classes: Sequence[str]) -> list[int | None] | None:
    """The rows of the classifier of a whole ``hf:PATH`` that belong to the run's classes, by name.

    None if the model names no classes; LABEL_0, which transformers writes, is not a name. Logs what is used.
    """
    own = model.hf.get("classes")
    if model.network is None or not own:
        return None
    if all(re.fullmatch(r"LABEL_\d+", name) for name in own):
        if len(own) == len(classes):
            log.warning(
                "%s does not name its %d classes: they must stand in the run's order, %s",
                model.network, len(own), ", ".join(classes),
            )  # fmt: skip
        else:
            log.warning(
                "%s has %d classes without names, and the run has %d: the classifier starts from scratch",
                model.network, len(own), len(classes),
            )  # fmt: skip
        return None
    rows = positions(classes, own)
    absent = [name for name, row in zip(classes, rows, strict=True) if row is None]
    if absent:
        log.warning(
            "%s has no class named %s: what its classifier lacks starts from scratch",
            model.network, ", ".join(absent),
        )  # fmt: skip
    if len(absent) < len(rows) and rows != list(range(len(own))):
        log.info("%s: the rows of its classifier are taken in the run's order, by name", model.network)
    return rows


def build_method(config: RunConfig, classes: Sequence[str], world: World, pretrained: bool = True) -> Method:
    """Seed, then build the method and its networks on the device.

    Args:
        classes: names of the run's classes.
        pretrained: False for a run that continues from a checkpoint. It holds all weights except the initial
            ones that a feature distance needs.

    Raises:
        UserError: the weights do not fit, or the method refuses a setting.
    """
    if world.device.type == "cpu" and config.train.keep_memory:
        keep_freed_memory()
    with world.first_goes_ahead():  # the first process may have to download the weights
        weights_path(config.model)
    seed_everything(config.train.seed)
    rows = classifier_rows(config.model, classes) if pretrained else None
    method_config = config.method_config()
    model = build_model(config.model, len(classes), pretrained or method_config.keeps_initial(), rows)
    method = get_method(config.method["name"])(method_config, model, len(classes))
    if config.train.sync_bn and world.size > 1:
        sync_batch_norm(method, world.device)
    if config.train.channels_last:  # the layout that the fused norms take
        fuse_norms(method)
    method.adjust(config.eval.logit_adjustment, config.eval.class_shares)
    method.horizon = config.optim.horizon or config.train.steps
    if config.optim.schedule == "poly" and method.horizon < config.train.steps:
        log.warning(
            "optim.horizon is %d: the learning rate is 0 from there to train.steps=%d; raise it as well",
            method.horizon,
            config.train.steps,
        )
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return in_layout(method.to(world.device), layout)


def build_optimizers(
    settings: dict[str, OptimConfig], networks: dict[str, nn.Module]
) -> dict[str, torch.optim.Optimizer]:
    """An optimiser per network.

    Raises:
        UserError: see :func:`~fastuda.engine.optim.build_optimizer`.
    """
    return {name: build_optimizer(settings[name], network) for name, network in networks.items()}


def build_run_loader(config: RunConfig, domains: RunDomains, method: Method, world: World) -> TorchLoader:
    """The loader of this process's share of the training images. Several sources are logged with their
    shares.

    Raises:
        UserError: see :func:`~fastuda.data.loading.build.build_loader`.
    """
    loader = build_loader(
        domains.sources,
        domains.target,
        config.data,
        method.model.input,
        seed=config.train.seed,
        rank=world.rank,
        world=world.size,
        pin=world.device.type == "cuda",
    )
    train = config.train
    images = train.steps * train.accumulate * config.data.batch_size * world.size
    shares = loader.samples.drawer.sampler.shares.tolist()
    for source, share in zip(domains.sources, shares, strict=True) if len(shares) > 1 else ():
        log.info(
            "source %s (%s): %d images, %.1f %% of the draws, %.1f passes in %d steps",
            source.name, source.split, len(source), 100 * share, images * share / len(source), train.steps,
        )  # fmt: skip
    return loader
