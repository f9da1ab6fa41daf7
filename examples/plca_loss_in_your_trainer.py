"""PLCA's association loss in your own training loop.

The network is only an example. The loss accepts features of any backbone, as [B, pixels, channels].
"""

import torch
from torch import nn

import fastuda.ops as F


def pixels(x: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, h w, C]."""
    return x.flatten(2).transpose(1, 2)


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 32, 7, 8, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1))
    head = nn.Conv2d(64, 5, 1)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for _ in range(steps):
        source, target = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 64, 96)
        label = torch.randint(0, 5, (2, 64, 96))  # 255 would be ignored
        source_features, target_features = backbone(source), backbone(target)

        supervised = F.upsample_cross_entropy(head(source_features), label)
        mixed = F.spatial_aggregate(pixels(target_features))
        association, cycles = F.cycle_association_loss(
            pixels(source_features), mixed, label[:, 4::8, 4::8].flatten(1)
        )
        loss = supervised + 0.1 * association

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        matched, valid = int(cycles.matched), int(cycles.valid)
        print(f"loss {loss.item():.3f}, {matched} of {valid} cycles close in their class")
    return losses


if __name__ == "__main__":
    main()
