"""Parts that the kernels share: operands, tile shapes, the tile product and the matrix products of panels."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

EPS_NORM = 1e-12
EPS_KL = 1e-10
EPS_STD = 1e-10
LOG2E = 1.4426950408889634

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Largest deviation of equal similarities due to rounding, relative to the larger of their size and 1."""

PANEL_BYTES = 32 << 20
"""Largest size of a panel of similarities or partial results, so that it stays in L2."""


class Side(NamedTuple):
    """One image of a pair, ready for the kernels; ``[B, N, ...]`` contiguous."""

    query: Tensor
    """[B, N, C] left operand of the product: the features, or the probabilities in float32."""
    key: Tensor
    """[B, N, C] right operand: the features, or ``log(p + 1e-10)`` in float32."""
    row: Tensor
    """[B, N] float32: the inverse norm (cosine), or minus the entropy term (KL)."""


def prepare(x: Tensor, similarity: str) -> Side:
    """The operands of one image.

    The cosine uses the raw features, so that half-precision inputs enter the tensor cores unrounded; the
    norms scale the float32 accumulator. KL probabilities are converted to float32, because rounded logarithms
    could change the match.
    """
    x = x.contiguous()
    if similarity == "cosine":
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
        return Side(x, x, norm.clamp(min=EPS_NORM).reciprocal())
    p = x.float()
    log_p = (p + EPS_KL).log()
    return Side(p, log_p, -(p * log_p).sum(-1))


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current, because Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def generation(x: Tensor) -> int:
    """Major compute capability of the tensor's GPU."""
    return torch.cuda.get_device_capability(x.device)[0]


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a block may use on the tensor's GPU."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


DEEP_PIPELINE = 3 * 3 * 128 * 64 * 2
"""Bytes of shared memory that the largest kernel needs at 128 x 128 x 64: three operands, three stages."""


def tile_shape(x: Tensor) -> dict[str, int]:
    """Block shape, warps and pipeline depth of a similarity tile; one fixed choice per dtype and GPU, so that
    two runs add in the same order."""
    if INTERPRETED:
        return dict(BM=64, BN=128, BK=128, num_warps=4, num_stages=1)
    if x.dtype == torch.float32:
        return dict(BM=128, BN=64, BK=32, num_warps=8, num_stages=2)
    if generation(x) < 9 or shared_memory(x) < DEEP_PIPELINE:  # some later cards have only 99 KiB
        return dict(BM=128, BN=128, BK=32, num_warps=8, num_stages=4)
    return dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)


def divides(x: Tensor, block: int) -> bool:
    """Whether the channel loop needs no mask."""
    return x.shape[-1] % block == 0


def channel_rows(x: Tensor) -> Tensor:
    """[B, h, w, C], contiguous, of features [B, C, h, w]; channels-last ones are not copied."""
    return x.permute(0, 2, 3, 1).contiguous()


def channel_block(channels: int) -> int:
    """Number of channels of a tile of :func:`channel_rows`."""
    return min(128 if INTERPRETED else 64, max(16, triton.next_power_of_2(channels)))


def padded_classes(classes: int) -> int:
    """Number of classes of a tile: a power of two that the tile product accepts."""
    return max(16, triton.next_power_of_2(classes))


@triton.jit
def tile_product(
    a,
    b,
    rows,  # [BM]
    cols,  # [BN]
    channels,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``a[rows] @ b[cols].T`` in float32, for row-major ``a`` and ``b`` of width ``channels``.

    ``rows`` and ``cols`` are int64 and within the tensors; the caller clamps them and masks the result.
    """
    # Addresses are computed once and advanced, so that the loop only adds to them.
    k = tl.arange(0, BK)  # [BK]
    a_at = a + rows[:, None] * channels + k[None, :]  # [BM, BK]
    b_at = b + cols[None, :] * channels + k[:, None]  # [BK, BN]
    # The sum is float32 for every type of operands, because norms and temperatures are applied to it.
    acc = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    for start in range(0, channels, BK):
        # Loads have a mask only if the last block of channels is not whole: a mask costs time in every round.
        if EVEN:
            x = tl.load(a_at)  # [BM, BK]
            y = tl.load(b_at)  # [BK, BN]
        else:
            inside = k < channels - start  # [BK]
            x = tl.load(a_at, mask=inside[None, :], other=0.0)  # [BM, BK]
            y = tl.load(b_at, mask=inside[:, None], other=0.0)  # [BK, BN]
        if UPCAST:  # the interpreter multiplies bf16 bit patterns
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        # TF32 would round float32 operands, and could change the best match.
        acc = tl.dot(x, y, acc, input_precision="ieee")
        a_at += BK
        b_at += BK
    return acc


@triton.jit
def product_strip(products, rows, cols, n, m, stride):
    """[BM, columns] of the products that the library wrote to a float32 panel, 0 outside."""
    # The mask is needed, because the panel is uninitialised past the edge of the product.
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]  # [BM, columns]
    return tl.load(products + at, mask=(rows < n)[:, None] & (cols < m)[None, :], other=0.0)


@triton.jit
def narrow(x, like, UPCAST: tl.constexpr):
    """float32 ``x`` in the element type of pointer ``like``, rounded to nearest even."""
    if UPCAST and like.dtype.element_ty == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)  # as x
        bits += 0x7FFF + ((bits >> 16) & 1)
        # it also takes the remaining bits of a rounded zero as a number
        x = (bits & -0x10000).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)


@triton.jit
def halves(s, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile."""
    # tl.split works on the last axis, so the two halves of the columns are moved there.
    # [BM, 2, BN // 2], then [BM, BN // 2, 2], then two of [BM, BN // 2]
    return tl.split(tl.permute(tl.reshape(s, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def quarters(s, BM: tl.constexpr, BN: tl.constexpr):
    """A tile in four strips of columns."""
    left, right = halves(s, BM, BN)  # both [BM, BN // 2]
    return halves(left, BM, BN // 2) + halves(right, BM, BN // 2)  # four of [BM, BN // 4]


@triton.jit
def grouped(pid, blocks, splits, GROUP: tl.constexpr):
    """Program number to (row block, column split). Neighbours share operands, which therefore stay in L2."""
    # Consecutive programs take the blocks of a group at one split, so its columns are read from memory once.
    per_group = GROUP * splits
    first = (pid // per_group) * GROUP
    # The last group may be smaller; its numbers must still cover every split.
    size = tl.minimum(blocks - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def panel_tile(n, m, blocks, splits, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """For a program of a panel [n, m]: its row block and column split, its rows [BM], and the addresses of
    the rows [BM] and columns [BN]. Those past the end read the last one, and their results are masked."""
    block, split = grouped(tl.program_id(0), blocks, splits, GROUP)
    rows = block * BM + tl.arange(0, BM)  # [BM]
    at_row = tl.minimum(rows, n - 1).to(tl.int64)  # [BM]
    at_col = tl.minimum(split * BN + tl.arange(0, BN), m - 1).to(tl.int64)  # [BN]
    return block, split, rows, at_row, at_col


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` in float32, by the library."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` in float32, by the library."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())
