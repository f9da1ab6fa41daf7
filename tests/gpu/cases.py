"""Small inputs of every op, and the ops that each GPU backend implements."""

from __future__ import annotations

import torch

import fastuda.ops as F

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def classes_of(*shape, classes=19, seed=0):
    labels = torch.randint(0, classes, shape, generator=generator(seed))
    labels[torch.rand(shape, generator=generator(seed + 1)) < 0.2] = 255
    return labels.to(DEVICE)


def features(n, seed=0):
    return torch.rand(2, n, 97, generator=generator(seed)) + 0.1


def association(x, backend):
    target = features(130, seed=1).to(x)
    loss, _ = F.cycle_association_loss(x, target, classes_of(2, 97, classes=3), backend=backend)
    return loss


def predictions(n, seed=12):
    return (2 * normal(2, n, 19, seed=seed)).softmax(-1)


def match_of_predictions(x, backend):
    labels, target = classes_of(2, 97, classes=3), predictions(130, seed=13).to(x)
    return F.cycle_association_loss(x, target, labels, similarity="kl", backend=backend)[0]


def entropy(x, backend, **options):
    return F.upsample_cross_entropy(x, classes_of(2, 61, 93), backend=backend, **options)


def soft_entropy(x, backend):
    soft = normal(2, 19, 61, 93, seed=2).softmax(1).to(DEVICE)
    weight = torch.linspace(0.5, 2, 19, device=DEVICE)
    return F.upsample_cross_entropy(
        x, soft, class_weight=weight, temperature=1.8, label_smoothing=0.1, backend=backend
    )


def weighted_entropy(x, backend):
    pixels = torch.rand(2, 61, 93, generator=generator(3)).to(DEVICE)
    return entropy(x, backend, pixel_weight=pixels, reduction="none", align_corners=True)


def domain(x, backend, **options):
    z = 4 * normal(2, 19, 9, 14, seed=4).to(x)
    return F.domain_cross_entropy(x, z, encode="target", size=(61, 93), backend=backend, **options)


def contrast(kind):
    mean, variance = normal(19, 40, seed=6), normal(19, 40, seed=7).square()
    bank = normal(19, 50, 40, seed=8)

    def run(x, backend):
        counts = (torch.arange(19, device=DEVICE) * 3).clamp(max=bank.shape[1])
        prototypes = (
            F.PrototypeBank(bank.to(DEVICE), counts)
            if kind == "bank"
            else F.ClassStatistics(counts, mean.to(DEVICE), variance.to(DEVICE))
        )
        labels = classes_of(700, seed=9)
        return F.prototype_contrast(x, labels, prototypes, kind=kind, tau=2.0, backend=backend)

    return run


LOGITS = 3 * normal(2, 19, 11, 17)
DOMAIN_LOGITS = 3 * normal(2, 38, 11, 17)
PROBABILITIES = (4 * normal(2, 7, 45, 70)).softmax(1)


# name: (op, input, function)
HEAD = [normal(19, 40, 3, 3, seed=13 + r) / 20 for r in range(4)]


def head(x, backend):
    return F.aspp(x, [w.to(x) for w in HEAD], dilations=(6, 12, 18, 24), backend=backend)


def depthwise(x, backend):
    return F.depthwise_conv2d(x, KERNELS.to(x), padding=4, dilation=4, backend=backend)


KERNELS = normal(40, 1, 3, 3, seed=17)

CASES = {
    "depthwise": ("depthwise_conv2d", normal(2, 40, 33, 50, seed=12), depthwise),
    "pooling": ("smooth_max_pool", LOGITS, lambda x, b: F.smooth_max_pool(x, k=3.0, backend=b)),
    "category features": (
        "category_pool",
        normal(2, 700, 40, seed=10),
        lambda x, b: F.category_pool(x, 4 * normal(2, 700, 19, seed=11).to(x), backend=b),
    ),
    "category attention": (
        "category_pool",
        4 * normal(2, 700, 19, seed=11),
        lambda x, b: F.category_pool(normal(2, 700, 40, seed=10).to(x), x, backend=b),
    ),
    "head": ("aspp", normal(2, 40, 33, 50, seed=12), head),
    "association": ("cycle_association_loss", features(97), association),
    "aggregation": ("spatial_aggregate", features(97), lambda x, b: F.spatial_aggregate(x, backend=b)),
    "association of predictions": ("cycle_association_loss", predictions(97), match_of_predictions),
    "aggregation of predictions": (
        "spatial_aggregate",
        predictions(97),
        lambda x, b: F.spatial_aggregate(x, similarity="kl", contrast=False, backend=b),
    ),
    "contrast": ("contrast_softmax", normal(3, 70, 63), lambda x, b: F.contrast_softmax(x, backend=b)),
    "entropy": ("upsample_cross_entropy", LOGITS, entropy),
    "soft entropy": ("upsample_cross_entropy", LOGITS, soft_entropy),
    "weighted entropy": ("upsample_cross_entropy", LOGITS, weighted_entropy),
    "domain": ("domain_cross_entropy", DOMAIN_LOGITS, domain),
    "hard domain": (
        "domain_cross_entropy",
        DOMAIN_LOGITS,
        lambda x, b: domain(x, b, hard_threshold=0.4, align_corners=False),
    ),
    "lovasz": (
        "lovasz_softmax",
        LOGITS,
        lambda x, b: F.lovasz_softmax(x, classes_of(2, 61, 93), from_logits=True, backend=b),
    ),
    "proto": ("prototype_contrast", normal(700, 40), contrast("proto")),
    "dist": ("prototype_contrast", normal(700, 40), contrast("dist")),
    "bank": ("prototype_contrast", normal(700, 40), contrast("bank")),
    "affinity": ("local_affinity", PROBABILITIES, lambda x, b: F.local_affinity(x, backend=b)),
    "far affinity": (
        "local_affinity",
        PROBABILITIES,
        lambda x, b: F.local_affinity(x, neighbours=4, distance=20, backend=b),
    ),
    "product": ("local_affinity", PROBABILITIES, lambda x, b: F.local_affinity(x, kind="product", backend=b)),
    "cleaning": (
        "affinity_cleaning_loss",
        4 * normal(2, 7, 45, 70),
        lambda x, b: F.affinity_cleaning_loss(x, backend=b),
    ),
}


TRITON = {
    "affinity", "aggregation", "aggregation of predictions", "association", "association of predictions",
    "bank", "category attention", "category features", "cleaning", "contrast", "depthwise", "dist", "domain",
    "entropy",
    "far affinity", "hard domain", "head", "lovasz", "pooling", "product", "proto", "soft entropy",
    "weighted entropy",
}  # fmt: skip


CUDA = {
    "affinity", "far affinity", "product", "cleaning", "statistics", "confusion", "entropy", "soft entropy",
    "weighted entropy", "domain", "hard domain",
}  # fmt: skip


def wide(n, seed, width=256):
    return normal(1, n, width, seed=seed) + torch.linspace(0, 1, width)


WIDE = {
    "cycle_association_loss": lambda x, b: F.cycle_association_loss(
        x, wide(1700, 1, x.shape[2]).to(x), classes_of(1, 1500, classes=3), backend=b
    )[0],
    "spatial_aggregate": CASES["aggregation"][2],
}
