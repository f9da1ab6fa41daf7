"""Devices by name."""

import pytest
import torch
import torch.distributed as dist

from fastuda.errors import UserError
from fastuda.system.distributed import pick_device


def test_picking_a_device_joins_no_group(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert pick_device("cpu") == torch.device("cpu")
    assert not dist.is_initialized()


def test_a_device_that_there_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="unknown device 'tpu': choose auto, cpu, cuda or cuda:N"):
        pick_device("tpu")
    with pytest.raises(UserError, match=r"--device cuda:1: this torch .* finds no CUDA device here"):
        pick_device("cuda:1")
