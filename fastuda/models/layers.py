"""The blocks of a backbone in their order, for learning rates that decay with the depth."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fastuda.errors import UserError


def blocks_of(backbone: nn.Module) -> list[str]:
    """Names of the repeated blocks, in the order of registration. Blocks are the elements of the innermost
    ``ModuleList`` or ``Sequential`` whose elements all have children and parameters."""
    places: list[str] = []
    for name, part in backbone.named_modules():
        inside = next((p for p in places if name.startswith(f"{p}.")), None)
        if not isinstance(part, (nn.ModuleList, nn.Sequential)) or not _holds_blocks(part):
            continue
        if inside is not None:
            places.remove(inside)  # a stage: its blocks count instead
        places += [f"{name}.{key}" if name else key for key, _ in part.named_children()]
    return places


def _holds_blocks(part: nn.Module) -> bool:
    children = list(part.children())
    return bool(children) and all(
        any(True for _ in child.children()) and any(True for _ in child.parameters()) for child in children
    )


def layer_factors(
    backbone: nn.Module, decay: float, decoder: Collection[int] = frozenset()
) -> dict[str, float]:
    """Factor of each parameter's learning rate: ``decay ** k``, where k blocks follow the parameter's block.

    Parameters before the first block (patch and position embeddings, tokens) have one more block after them
    than the first block. Parameters after a block have the factor of that block.

    Args:
        decoder: ids of the parameters of a decoder inside the backbone; they belong to no block.

    Source: Bao et al., BEiT, ICLR 2022; Clark et al., ELECTRA, ICLR 2020.

    Raises:
        UserError: the decay is below 1, and the backbone has no blocks.
    """
    names = list(dict(backbone.named_parameters()))
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    blocks = [
        block for block in blocks_of(backbone)
        if not any(id(p) in decoder for p in backbone.get_submodule(block).parameters())
    ]  # fmt: skip
    if not blocks:
        raise UserError("optim.layer_decay needs a backbone of blocks, as a ViT or a ResNet; set it to 1")
    number = {block: index for index, block in enumerate(blocks, 1)}
    factors, reached = {}, 0
    for name in names:
        own = next((number[block] for block in blocks if name.startswith(f"{block}.")), None)
        # parameters between two stages belong to the stage before them
        reached = reached if own is None else max(reached, own)
        factors[name] = decay ** (len(blocks) - (own or reached))
    return factors
