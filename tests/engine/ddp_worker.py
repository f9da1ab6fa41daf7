"""One rank of tests/engine/test_ddp.py: the gradients of a step on this rank's share of a joint batch."""

from __future__ import annotations

import dataclasses
import sys

import torch
from torch import nn

from fastuda import cli
from fastuda.data.loading.batch import Batch
from fastuda.engine.curves import RunningMeans
from fastuda.engine.parallel import Parallel, sync_batch_norm
from fastuda.methods import Method, get_method
from fastuda.models import ModelConfig, build_model
from fastuda.system import distributed
from fastuda.system.ddp import bare_state
from fastuda.system.settings import build

CLASSES = 5


def joint_batch(seed: int, lopsided: bool, size: tuple[int, int] = (32, 64)) -> Batch:
    """Four images of each domain; the two halves have very different shares of ignored pixels.

    ``lopsided``: besides, the last class is in the first half only, the one before it nowhere, and the second
    half of the batch with seed 1 has no label at all.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 4, 3, *size, generator=generator, dtype=torch.float64)
    label = torch.randint(0, CLASSES, (4, size[0] // 8, size[1] // 8), generator=generator)
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    if lopsided:
        label[label == CLASSES - 2] = 0
        label[2:][label[2:] == CLASSES - 1] = 1
    label[2:, : size[0] if lopsided and seed == 1 else 20] = 255
    images[0] += label.clamp(max=CLASSES)[:, None] - 2.0
    names = tuple(f"{i}.png" for i in range(4))
    tags = torch.rand(4, CLASSES, generator=generator) < 0.6
    tags[3] = False  # an image that shows nothing
    points = torch.stack([torch.randint(0, n, (4, 3), generator=generator) for n in (*size, CLASSES)], 2)
    return Batch(images[0], label, images[1], names, names, tags, points)


def part(batch: Batch, rank: int, size: int) -> Batch:
    """This rank's images."""
    each = 4 // size
    chosen = slice(rank * each, (rank + 1) * each)
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{key: value if value is None else value[chosen] for key, value in values.items()})


def steps(
    name: str, settings: dict, world: distributed.World, count: int, lopsided: bool = False
) -> tuple[Method, dict[str, torch.Tensor]]:
    """The method after ``count`` steps, and the gradients of the last of them."""
    torch.manual_seed(0)
    cls = get_method(name)
    settings = dict(settings)
    model = build_model(ModelConfig(backbone="small", **settings.pop("model", {})), CLASSES)
    model.pretrained = True
    method = cls(build(cls.Config, settings, "method"), model, CLASSES)
    if world.size > 1:
        sync_batch_norm(method, world.device)
    method = method.double().train()
    networks = method.networks()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in networks.values()]
    parallel = Parallel(method, networks, world)
    for step in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        phases = method.phases(part(joint_batch(step, lopsided), world.rank, world.size), step)
        while True:
            parallel.before()
            phase = next(phases, None)
            if phase is None:
                break
            torch.stack(list(phase.losses.values())).sum().backward()
            parallel.after(phase.net)
        parallel.reduce()
        if step + 1 < count:
            for optimizer in optimizers:
                optimizer.step()
            method.after_step(step)
            parallel.share_statistics()
    gradients = {
        f"{name}.{key}": p.grad
        for name, net in networks.items()
        for key, p in net.named_parameters()
        if p.grad is not None
    }
    return method, gradients


class Uneven(Method):
    """A part is used in the first phase only, and another network has phases in between: the hard case."""

    def __init__(self, config: object, model: nn.Module, num_classes: int):
        super().__init__(config, model, num_classes)  # type: ignore[arg-type]
        model.extra = nn.Conv2d(CLASSES, CLASSES, 1)
        self.judge = nn.Conv2d(CLASSES, 1, 1)

    def networks(self):
        return {"model": self.model, "judge": self.judge}

    def phases(self, batch: Batch, step: int):
        from fastuda.methods import Phase

        yield Phase("model", {"a": self.model.extra(self.model(batch.source_image).logits).square().mean()})
        logits = self.model(batch.target_image).logits
        yield Phase("judge", {"b": self.judge(logits.detach()).square().mean()})
        yield Phase("model", {"c": logits.cos().mean()})
        if step % 2:
            yield Phase("judge", {"d": self.judge(logits.detach().exp()).sin().mean()})


def main() -> int:
    world = distributed.start("cpu")
    torch.set_num_threads(1)
    cases = torch.load(sys.argv[1], weights_only=True)
    results = {}
    for key, (name, settings, count, *lopsided) in cases.items():
        method, gradients = steps(name, settings, world, count, *lopsided)
        state = bare_state(method)
        gathered = world.gather({k: v for k, v in state.items() if v.is_floating_point()})
        same = all(torch.equal(gathered[0][k], g[k]) for g in gathered for k in g)
        results[key] = {
            "gradients": {k.replace("wrapped.module.", ""): g for k, g in gradients.items()},
            "state": state,
            "ranks_agree": same,
        }
    means = RunningMeans(world)
    means.steps = 1
    means.add("both", 1.0 + world.rank)
    means.add(f"of {world.rank}", 4.0)
    if world.rank:
        means.add("another", 6.0)
    results["means"] = means.take()
    if world.first:
        torch.save(results, sys.argv[2])
    distributed.stop()
    return 0


if __name__ == "__main__":
    cli.run(main)
