"""Scores: class-centre distances against the published formula, and their command line."""

import csv
import json
import shutil

import pytest
import torch
from torch.nn import functional as nnf

import fastuda.ops as F
from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.labels import CITYSCAPES, CITYSCAPES_ROWS
from fastuda.data.loading.evaluation import eval_loader
from fastuda.inference.saved import load_run
from fastuda.inference.scores import Scores, ccd_table, class_centre_distance, table
from tests.program import TINY, fastuda

ID_OF = {row.name: row.id for row in CITYSCAPES_ROWS}


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


def test_iou_is_hits_over_the_union_of_label_and_prediction():
    """Counted from sets of pixels; classes 0 to 4: common, common, only predicted, only labelled, neither."""
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 1, 3])[torch.randint(0, 3, (400,), generator=generator)]
    predicted = torch.tensor([0, 0, 0, 1, 2])[torch.randint(0, 5, (400,), generator=generator)]
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    confusion.index_put_((label, predicted), torch.ones(400, dtype=torch.int64), accumulate=True)
    wanted = []
    for c in range(5):
        there, found = (set(torch.nonzero(x == c).flatten().tolist()) for x in (label, predicted))
        wanted.append(100 * len(there & found) / len(there | found) if there | found else float("nan"))
    assert len({*wanted[:2], 0.0}) == 3 and wanted[2:4] == [0, 0]
    scores = Scores.of(confusion, ("a", "b", "c", "d", "e"))
    assert scores.iou == pytest.approx(wanted, nan_ok=True)
    assert scores.protocols() == {"mIoU5": pytest.approx(sum(wanted[:4]) / 4)}
    assert scores.as_dict()["iou"]["e"] is None


def test_protocols_are_means_over_the_published_classes():
    """SYNTHIA's 16 of the 19 lack terrain, truck and train, the 13 also wall, fence and pole."""
    iou = [float(2**k % 97) for k in range(19)]
    lack = {"terrain", "truck", "train"}
    means = Scores(CITYSCAPES.names, tuple(iou)).protocols()
    assert means["mIoU19"] == pytest.approx(sum(iou) / 19)
    for name, without in (("mIoU16", lack), ("mIoU13", lack | {"wall", "fence", "pole"})):
        kept = [v for n, v in zip(CITYSCAPES.names, iou, strict=True) if n not in without]
        assert means[name] == pytest.approx(sum(kept) / len(kept)) and len(kept) == int(name[4:])


def test_the_table_has_the_gain_of_the_second_run_over_the_first():
    runs = {"one": Scores(("a", "b"), (10.0, float("nan"))), "two": Scores(("a", "b"), (12.5, 3.0))}
    rows = {line.split()[0]: line.split()[1:] for line in table(runs).splitlines()}
    assert rows["class"] == ["one", "two", "gain"]
    assert rows["a"] == ["10.0", "12.5", "+2.5"] and rows["b"] == ["-", "3.0", "-"]
    assert rows["mIoU2"] == ["10.0", "7.8", "-2.2"]


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


def test_a_run_of_nineteen_classes_on_a_target_of_thirteen(scenes_root, tmp_path):
    """Cross-City: the other six can be predicted, which is wrong, and are not scored."""
    out = tmp_path / "run"
    assert fastuda("train", "--data-root", scenes_root, "--out", out, "--steps", 2, *TINY).returncode == 0
    assert "classes (19): road, sidewalk" in (out / "log.txt").read_text()  # shown before training
    whole = json.loads(fastuda("evaluate", out, "--json").stdout)
    names = ("sidewalk", "Road", "vegetation", "sky", "human")
    city = tmp_path / "city"
    ids = {name: ID_OF[name] for name in ("sidewalk", "road", "vegetation", "sky", "person")}
    lines = [f"names: [{', '.join(names)}]", f"ids: {list(ids.values())}"]
    lines += [f"ignore: {[i for i in range(34) if i not in ids.values()]}"]
    lines += ["images: leftImg8bit/{split}/**_leftImg8bit.png"]
    lines += ["labels: gtFine/{split}/**_gtFine_labelIds.png"]
    shutil.copytree(scenes_root / "scenes" / "cityscapes", city)
    (city / "classes.yaml").write_text("\n".join(lines))
    done = fastuda("evaluate", out, "--target", f"folder:{city}", "--split", "val", "--json", "--ccd")
    assert done.returncode == 0, done.stderr
    assert "not scored" in done.stderr and "building" in done.stderr and "road" not in done.stderr
    part = json.loads(done.stdout)
    assert list(part["iou"]) == ["road", "sidewalk", "vegetation", "sky", "person"] and "mIoU5" in part
    assert list(part["ccd"]) == list(part["iou"])

    confusion = torch.zeros(19, 19, dtype=torch.int64)
    _, method, _ = load_run(out, torch.device("cpu"))
    domain = open_domain("scenes", role="evaluation", data_root=str(scenes_root), split="auto")
    with torch.no_grad():
        for image, label, _ in eval_loader(domain, DataConfig(workers=0), method.model.input):
            scores = method.predict(image.to(memory_format=torch.channels_last)).scores
            label = torch.where(torch.isin(label, torch.tensor([0, 1, 8, 10, 11])), label, 255)
            confusion += F.upsample_confusion(scores, label)
    truth = Scores.of(confusion, tuple(whole["iou"])).only(tuple(part["iou"]))
    assert part == {**truth.as_dict(), "ccd": part["ccd"], "mean_ccd": part["mean_ccd"]}

    done = fastuda("evaluate", out, "--classes", "road", "sky", "--json")
    chosen = json.loads(done.stdout)
    assert chosen["iou"] == {name: whole["iou"][name] for name in ("road", "sky")} and "mIoU2" in chosen
    done = fastuda("evaluate", out, "--classes", "rode")
    assert done.returncode == 2 and "there is no score for a class 'rode'; did you mean road" in done.stderr
    (city / "classes.yaml").write_text("\n".join(["names: [banana]", "ids: [7]", *lines[3:]]))
    done = fastuda("evaluate", out, "--target", f"folder:{city}", "--split", "val")
    assert done.returncode == 2 and "has none of the classes road, sidewalk" in done.stderr


def test_classes_that_the_run_took_for_one_are_one_in_the_evaluation(scenes_root, tmp_path):
    out = tmp_path / "run"
    alias = "data.class_alias=[building=car, vegetation=car]"
    done = fastuda("train", "--data-root", scenes_root, "--out", out, "--steps", 2, *TINY, alias)
    assert done.returncode == 0, done.stderr
    again = fastuda("evaluate", out, "--json")
    assert again.returncode == 0, again.stderr
    result, found = json.loads((out / "result.json").read_text()), json.loads(again.stdout)
    assert found["iou"] == result["iou"] and len(found["iou"]) == 17

    # names of the source are known as well
    city = tmp_path / "city"
    shutil.copytree(scenes_root / "scenes" / "cityscapes", city)
    lines = ["names: [auto, sky]", f"ids: [{ID_OF['car']}, {ID_OF['sky']}]"]
    lines += [f"ignore: {[i for i in range(34) if i not in (ID_OF['car'], ID_OF['sky'])]}"]
    lines += ["images: leftImg8bit/{split}/**_leftImg8bit.png"]
    lines += ["labels: gtFine/{split}/**_gtFine_labelIds.png"]
    (city / "classes.yaml").write_text("\n".join(lines))
    args = ("--target", f"folder:{city}", "--split", "val", "--json", "data.class_alias=[building=auto]")
    named = fastuda("evaluate", out, *args)
    assert named.returncode == 0 and list(json.loads(named.stdout)["iou"]) == ["building", "sky"], (
        named.stderr
    )


def test_a_target_without_labels_trains_without_scores(scenes_root, tmp_path):
    target, out = tmp_path / "target", tmp_path / "run"
    shutil.copytree(scenes_root / "scenes" / "cityscapes" / "leftImg8bit" / "train", target / "images")
    (target / "classes.yaml").write_text("names: [road, sky, car]")
    wanted = [
        "--method",
        "plca",
        "--source",
        f"gta5:{scenes_root}/scenes/gta5",
        "--target",
        f"folder:{target}",
    ]
    refused = fastuda("train", *wanted, "--out", out, "--steps", 2, *TINY)
    assert refused.returncode == 2 and "data.eval_split=none trains without scores" in refused.stderr
    assert not out.exists()
    done = fastuda(
        "train", *wanted, "--out", out, "--steps", 2, *TINY, "data.eval_split=none", "eval.every=1"
    )
    assert done.returncode == 0 and done.stdout.startswith("no scores: the target has no held-out labels"), (
        done.stderr
    )
    assert (out / "table.txt").read_text().splitlines()[-1].split() == ["mIoU3", "-"]
    result = json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["mIoU3"] is None and result["iou"] == dict.fromkeys(("road", "sky", "car"))
    assert "val/" not in (out / "metrics.csv").read_text()
    assert fastuda("compare", out).returncode == 0
    done = fastuda("evaluate", out)
    assert done.returncode == 2 and "was trained with data.eval_split=none: name a split" in done.stderr
    done = fastuda("predict", out, target / "images", "--out", tmp_path / "labels", "--quiet")
    assert done.returncode == 0, done.stderr
