"""Chooses and builds the training loader."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.errors import UserError
from fastuda.models.normalization import Normalization

log = logging.getLogger("fastuda")

LARGE = 512 * 512
"""Smallest crop, in pixels, for which DALI is faster than torch without a GPU."""


def build_loader(
    source: Domain | Sequence[Domain],
    target: Domain,
    config: DataConfig,
    normalization: Normalization,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> TorchLoader:
    """Training loader that ``config.loader`` names, of one or several sources.

    Raises:
        UserError: the domains have different classes, or the loader does not support the configuration.
    """
    for one in (source,) if isinstance(source, Domain) else source:
        if one.classes.names != target.classes.names:
            raise UserError(
                f"{one.name} and {target.name} have different classes:"
                f" {', '.join(one.classes.names)} against {', '.join(target.classes.names)}"
            )
    kind = TorchLoader
    if choose_loader(config) == "dali":
        from fastuda.data.loading.dali_loader import DaliLoader as kind
    return kind(source, target, config, normalization, seed=seed, rank=rank, world=world, pin=pin)


def choose_loader(config: DataConfig) -> str:
    """Name of the loader, torch or dali, that ``config.loader`` selects.

    ``auto`` selects dali if it is installed and there is a GPU or a crop of at least 512 x 512 (measured on
    CPUs by bench/loader.py), and logs the choice.

    Raises:
        UserError: ``config.loader`` is dali, which does not support the configuration.
    """
    torch_only = [name for name in ("weak_labels", "pairs") if getattr(config, name)]
    if torch_only and config.loader != "torch":
        if config.loader == "dali":
            raise UserError(f"data.{torch_only[0]} needs data.loader=torch: DALI does not support it")
        log.info("loader: torch (it supports data.%s)", torch_only[0])
        return "torch"
    if config.loader != "auto":
        return config.loader
    from fastuda.data.loading.dali_loader import available

    if config.crop[0] * config.crop[1] < LARGE and not torch.cuda.is_available():
        chosen, why = "torch", "small crops, no GPU"
    elif not available():
        chosen, why = "torch", "DALI is not installed"
    else:
        chosen, why = "dali", "decoding on the GPU" if torch.cuda.is_available() else "large crops"
    log.info("loader: %s (%s)", chosen, why)
    return chosen
