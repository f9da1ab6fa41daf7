"""The best match of every query, and the kernel that merges the parts of a search into it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastuda.kernels._common import LOG2E


class Best(NamedTuple):
    """The result for every query, over all keys."""

    index: Tensor
    """[B, N] int64: the most similar key; the lowest index of equal ones."""
    similarity: Tensor
    """[B, N] float32."""
    sum: Tensor
    """[B, N] float32: sum of ``exp((s - similarity) / temperature)``."""

    @classmethod
    def empty(cls, row: Tensor) -> Best:
        """The result before any key is seen."""
        index = torch.zeros(row.shape, dtype=torch.int64, device=row.device)
        return cls(index, torch.full_like(row, float("-inf")), torch.zeros_like(row))

    def lse(self, temperature: Tensor) -> Tensor:
        """[B, N] log-sum-exp of ``s / temperature``; the division matches that of the loss bit for bit."""
        return self.similarity / temperature + self.sum.log()


def merge(
    part: tuple[Tensor, Tensor, Tensor], count: int, stride: int, temperature: Tensor, into: Best, lse: bool
) -> None:
    """Merge ``count`` parts [B, stride, L] of value, index and (with ``lse``) sum into ``into``, in a fixed
    order."""
    batch, length = into.index.shape
    merge_best[(triton.cdiv(length, 64), batch)](
        *part,
        temperature,
        into.similarity,
        into.index,
        into.sum,
        length,
        count,
        stride,
        LSE=lse,
        LOG2E=LOG2E,
        BP=16,
        BL=64,
        num_warps=4,
    )


@triton.jit
def merge_best(
    part_value,
    part_index,
    part_sum,
    temperature,
    value_out,
    index_out,
    sum_out,
    length,
    parts,
    stride,
    LSE: tl.constexpr,
    LOG2E: tl.constexpr,
    BP: tl.constexpr,
    BL: tl.constexpr,
):
    """Merge ``parts`` partials [B, stride, L] into the running best; of equal ones the lowest index stays."""
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BL + tl.arange(0, BL)  # [BL]
    ok = at < length  # [BL]
    mine = batch * length + at  # [BL]
    inv = LOG2E / tl.load(temperature + mine, mask=ok, other=1.0)  # [BL]
    # The merge continues from the result of earlier chunks, whose memory for partials is reused.
    best = tl.load(value_out + mine, mask=ok, other=0.0)  # [BL]
    best_index = tl.load(index_out + mine, mask=ok, other=0)  # [BL]
    total = tl.load(sum_out + mine, mask=ok, other=0.0)  # [BL]
    p = tl.arange(0, BP)  # [BP]
    # One program merges all parts in order, so that two runs agree bit for bit.
    for start in range(0, parts, BP):
        here = start + p  # [BP]
        where = (batch * stride + here)[:, None] * length + at[None, :]  # [BP, BL]
        mask = (here < parts)[:, None] & ok[None, :]  # [BP, BL]
        value = tl.load(part_value + where, mask=mask, other=float("-inf"))  # [BP, BL]
        index = tl.load(part_index + where, mask=mask, other=0)  # [BP, BL]
        top = tl.maximum(tl.max(value, 0), best)  # [BL]
        best_key = tl.min(tl.where(value == top[None, :], index, 2147483647), 0)  # [BL]
        if LSE:
            # Every sum is rescaled to the new maximum before it is added, so that no exponent is above 0.
            sums = tl.load(part_sum + where, mask=mask, other=0.0)  # [BP, BL]
            total = total * tl.exp2((best - top) * inv)
            total += tl.sum(sums * tl.exp2((value - top[None, :]) * inv[None, :]), 0)
        # Later parts hold later keys, so only a greater similarity replaces an earlier match.
        best_index = tl.where(top > best, best_key.to(tl.int64), best_index)
        best = top
    tl.store(value_out + mine, best, mask=ok)
    tl.store(index_out + mine, best_index, mask=ok)
    tl.store(sum_out + mine, total, mask=ok)
