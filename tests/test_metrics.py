"""Scores: class-centre distances against the published formula, and their command line."""

import csv
import json

import pytest
import torch
from torch.nn import functional as nnf

import fastuda.ops as F
from fastuda.data.config import DataConfig
from fastuda.data.domains import open_domain
from fastuda.data.torch_loader import eval_loader
from fastuda.metrics import Scores, ccd_table, class_centre_distance
from fastuda.saved import load_run
from tests.program import TINY, fastuda


def literal_ccd(features: torch.Tensor, labels: torch.Tensor, classes: int) -> list[float]:
    """The published formula, pixel by pixel; NaN for a class without features."""
    sets = {i: [x for x, y in zip(features, labels, strict=True) if y == i] for i in range(classes)}
    centre = {i: sum(s) / len(s) for i, s in sets.items() if s}
    out = []
    for i in range(classes):
        total, others = 0.0, [j for j in centre if j != i]
        for j in others if i in centre else []:
            within = sum(((x - centre[i]) ** 2).sum().item() for x in sets[i]) / len(sets[i])
            total += within / ((centre[i] - centre[j]) ** 2).sum().item()
        out.append(total / len(others) if i in centre and others else float("nan"))
    return out


def test_class_centre_distance_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (300,), generator=generator)
    labels[labels == 3] = 255  # class 3 does not occur
    features = torch.randn(300, 7, generator=generator, dtype=torch.float64) + labels[:, None] % 7
    found = class_centre_distance(F.class_statistics(features, labels, 5))
    assert found.tolist() == pytest.approx(literal_ccd(features, labels, 5), rel=1e-9, nan_ok=True)
    assert found[3].isnan() and found.isfinite().sum() == 4
    parts = [F.class_statistics(features[i::3], labels[i::3], 5) for i in range(3)]
    merged = class_centre_distance(parts[0].merge(parts[1]).merge(parts[2]))
    torch.testing.assert_close(merged, found, rtol=1e-9, atol=0, equal_nan=True)


def test_one_class_alone_has_no_distance():
    statistics = F.class_statistics(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64), 2)
    assert class_centre_distance(statistics).isnan().all()
    scores = Scores(("road", "car"), (50.0, float("nan")), (float("nan"), float("nan")))
    assert scores.as_dict()["mean_ccd"] is None and ccd_table(scores).splitlines()[-1].split()[-1] == "-"


def test_command(scenes_root, tmp_path):
    out = tmp_path / "run"
    done = fastuda("train", "--data-root", scenes_root, "--out", out, "--steps", 2, *TINY)
    assert done.returncode == 0, done.stderr
    done = fastuda("evaluate", out, "--ccd", "--json", "--csv", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    _, method, classes = load_run(out, torch.device("cpu"))
    domain = open_domain("scenes", role="evaluation", data_root=str(scenes_root), split="auto")
    features, labels = [], []
    with torch.no_grad():
        for image, label, _ in eval_loader(domain, DataConfig(workers=0), method.model.input):
            x = method.model(image.to(memory_format=torch.channels_last)).features
            features.append(x.permute(0, 2, 3, 1).flatten(0, 2))
            labels.append(nnf.interpolate(label[:, None].float(), x.shape[2:]).long().flatten())
    truth = literal_ccd(torch.cat(features).double(), torch.cat(labels), len(classes))
    found = [float("nan") if value is None else value for value in result["ccd"].values()]
    assert list(result["ccd"]) == list(classes.names)
    assert found == pytest.approx(truth, rel=1e-4, nan_ok=True)
    known = [value for value in truth if value == value]
    assert len(known) > 3 and result["mean_ccd"] == pytest.approx(sum(known) / len(known), rel=1e-4)

    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [float(row["ccd"]) for row in rows] == pytest.approx(truth, rel=1e-4, nan_ok=True)
    said = fastuda("evaluate", out, "--ccd").stdout
    assert "CCD" in said and said.splitlines()[-1].startswith("mean CCD")
    assert "CCD" not in fastuda("evaluate", out).stdout
