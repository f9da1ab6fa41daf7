"""Distributed training: the process group of torchrun, and the collectives that the trainer needs."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastuda.errors import UserError

log = logging.getLogger("fastuda")


@dataclass(frozen=True)
class World:
    """This process and its place in the process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def agree(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Run the block on the first rank alone, then on the others: for files that the first one creates."""
        if not self.first:
            self.barrier()
        try:
            yield
        finally:
            if self.first:
                self.barrier()

    def beat(self, step: int) -> None:
        """Publish the step that this rank has reached."""
        if self.size > 1:
            _store().set(f"fastuda/step/{self.rank}", str(step))

    def silent(self, grace: float = 2.0) -> str:
        """The ranks that do not call this within ``grace`` seconds: called by a rank whose wait timed out."""
        store = _store()
        store.set(f"fastuda/waited/{self.rank}", "yes")
        time.sleep(grace)
        steps = {}
        for rank in range(self.size):
            if not store.check([f"fastuda/waited/{rank}"]):
                has_begun = store.check([f"fastuda/step/{rank}"])
                steps[rank] = (
                    f"after step {int(store.get(f'fastuda/step/{rank}'))}" if has_begun else "at the start"
                )
        return ", ".join(f"rank {rank} ({step})" for rank, step in steps.items()) or "every rank"


def joint_mean(mean: Tensor, count: Tensor | int) -> Tensor:
    """This rank's mean over ``count`` items, weighted so that the average over the ranks is the mean over all
    items.

    ``mean * count * ranks / sum over ranks of count``; with a single process, ``mean`` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mean
    own = torch.as_tensor(count, device=mean.device).to(torch.float64)
    total = own.clone()
    dist.all_reduce(total)
    return mean * (own * dist.get_world_size() / total.clamp(min=1)).to(mean.dtype)


def joint_share(mean: Tensor) -> Tensor:
    """The average over the ranks, without gradient."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return joint_sum(mean) / ranks


def joint_sum(x: Tensor) -> Tensor:
    """The sum over the ranks, without gradient."""
    total = x.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def fresh_store(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """The store with a prefix that all ranks of this attempt share and that no earlier attempt has used.

    After a restart torchrun reuses the store, which still holds the addresses of dead ranks: a rank that
    reads one of them waits forever. The first rank draws a new prefix and answers every greeting until each
    living rank has confirmed it.

    Raises:
        UserError: a rank did not come within ``timeout`` seconds.
    """
    if rank:
        own = uuid.uuid4().hex
        store.set(f"fastuda/hello/{rank}", own)
        answer = f"fastuda/attempt/{rank}/{own}"
        store.wait([answer], timedelta(seconds=timeout))
        prefix = store.get(answer).decode()
        store.set(f"{prefix}/{rank}", "here")
        return dist.PrefixStore(prefix, store)
    prefix = f"fastuda/{uuid.uuid4().hex}"
    deadline = time.monotonic() + timeout
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{prefix}/{other}"]):
                missing.discard(other)
            elif store.check([f"fastuda/hello/{other}"]):
                greeting = store.get(f"fastuda/hello/{other}").decode()
                store.set(f"fastuda/attempt/{other}/{greeting}", prefix)
        if missing and time.monotonic() > deadline:
            raise UserError(f"rank {', '.join(map(str, sorted(missing)))} did not join within {timeout:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


def pick_device(device: str) -> torch.device:
    """The device of this process. A CUDA device becomes the current one.

    Args:
        device: auto, cpu, cuda or cuda:N. Others of this torch, such as mps, are used with a warning.

    Raises:
        UserError: the device does not exist here.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        chosen = torch.device("cpu")  # torch accepts an index, which has no meaning
    else:
        _check_there(chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    return chosen


def start(device: str, timeout: float = 1800) -> World:
    """Join the process group of torchrun, or return the world of a single process.

    Args:
        device: see :func:`pick_device`.
        timeout: seconds that a rank waits for the others in a collective.

    Raises:
        UserError: the device does not exist here.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        fresh = fresh_store(store, rank, size, timeout)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=limit)
    return World(rank, size, chosen)


def _check_there(device: torch.device) -> None:
    """Raises:
    UserError: this torch, or this machine, has no such device.
    """
    module = getattr(torch, device.type, None)  # torch.cuda, torch.mps, torch.xpu
    available = getattr(module, "is_available", lambda: False)
    if device.type == "mps":
        available = torch.backends.mps.is_available
    if not available():
        raise UserError(
            f"--device {device}: this torch ({torch.__version__}) finds no {device.type.upper()} device here;"
            " choose auto, cpu, cuda or cuda:N"
        )
    if device.index is not None and device.index >= module.device_count():  # type: ignore[union-attr]
        raise UserError(
            f"--device {device}: there are {module.device_count()}, numbered from 0"  # type: ignore[union-attr]
        )
    if device.type != "cuda":
        log.warning(
            "fastuda is not tested on %s, where the ops run in plain torch, which stores every matrix;"
            " --device cpu if an operation is missing there",
            device.type,
        )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
