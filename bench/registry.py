"""What is measured: the ops as data, one case per line, and the floor of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    The floor is ``max(products * GEMM time, moved bytes / copy rate)``, where a product is the ``N x C`` by
    ``C x N`` GEMM of the case's dtype and the copy is of the same bytes, both measured in the same run.
    """

    op: str
    mode: str
    """fwd, or fwd+bwd."""
    dtype: str
    pixels: int
    channels: int
    similarity: str = "cosine"
    batch: int = 1

    @property
    def products(self) -> float:
        """Tile products that no exact method without N x N storage avoids."""
        if self.op == "contrast_softmax":
            return 0.0
        if self.op == "cycle_match":
            return 1.0 if self.similarity == "cosine" else 2.0
        if self.op == "cycle_association_loss":
            # tiles once and once for the temperatures; backward: tiles again and two gradients
            return 5.0 if self.mode == "fwd+bwd" else 2.0
        # temperatures and tiles half each, weighted sum; backward: half the tiles, weights, values, features
        return 5.5 if self.mode == "fwd+bwd" else 2.0

    @property
    def moved(self) -> int:
        """Bytes that must be read or written once, 0 where products bound the op."""
        if self.op != "contrast_softmax":
            return 0
        element = torch.finfo(DTYPES[self.dtype]).bits // 8
        arrays = 2 if self.mode == "fwd" else 5
        return arrays * element * self.batch * self.pixels * self.channels

    @property
    def shape(self) -> str:
        """As printed in the table."""
        kind = "" if self.similarity == "cosine" else f" {self.similarity}"
        return f"{self.batch}x{self.pixels}x{self.channels}{kind}"


BOTH = ("fwd", "fwd+bwd")
CASES = [
    *(
        Case(op, mode, dtype, pixels, 2048)
        for op in ("cycle_association_loss", "spatial_aggregate")
        for dtype in ("bfloat16", "float32")
        for pixels in (4096, 8464)
        for mode in BOTH
    ),
    *(Case("cycle_match", "fwd", dtype, 4096, 2048) for dtype in ("bfloat16", "float32")),
    *(
        Case(op, "fwd+bwd", "float32", 8464, 19, "kl")
        for op in ("cycle_association_loss", "spatial_aggregate")
    ),
    *(Case("contrast_softmax", mode, "float32", 8464, 8464) for mode in BOTH),
    Case("cycle_association_loss", "fwd+bwd", "bfloat16", 32768, 256),
]
SWEEP = [
    Case(op, "fwd+bwd", "float32", pixels, 256)
    for op in ("cycle_association_loss", "spatial_aggregate")
    for pixels in (1024, 2048, 4096, 8192)
]
"""The sizes of the plot of time and memory against N."""


def make_inputs(case: Case, device: str, pixels: int | None = None) -> dict[str, torch.Tensor]:
    """Features with a common mean, as a ReLU network gives them, or probabilities; every cycle matches."""
    n = pixels or case.pixels
    generator = torch.Generator().manual_seed(0)

    def rows(shift: float) -> torch.Tensor:
        shape = (case.batch, n, case.channels)
        x = torch.randn(shape, generator=generator)
        if case.op == "contrast_softmax":
            x = x[..., : case.channels]
        elif case.similarity == "kl":
            x = (2 * x).softmax(-1)
        else:
            x = x.add_(shift).relu_()
        return x.to(device=device, dtype=DTYPES[case.dtype]).requires_grad_(case.mode != "fwd")

    if case.op == "contrast_softmax":
        return {"x": rows(0.0)}
    if case.op == "spatial_aggregate":
        return {"x": rows(0.3)}
    labels = torch.zeros(case.batch, n, dtype=torch.int64, device=device)
    return {"source": rows(0.3), "target": rows(0.3), "labels": labels}
