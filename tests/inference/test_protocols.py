"""The protocols of a target that has classes which the run lacks, against the authors' ways of counting; and
the constants of the recipes that use them."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastuda.config.resolve import load_yaml, resolve, shipped
from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.domains.run import share_classes
from fastuda.data.labels import CITYSCAPES, SYNTHIA_13, SYNTHIA_16
from fastuda.data.loading.evaluation import eval_loader
from fastuda.inference.evaluation import feature_statistics
from fastuda.inference.saved import load_run, read_result, scores_of
from fastuda.inference.scores import Scores, class_centre_distance, protocol_line, table
from fastuda.methods import get_method
from fastuda.models.backbones import init_scratch
from fastuda.models.deeplab import ASPP
from fastuda.models.normalization import INPUTS
from fastuda.models.vgg import VGG16
from fastuda.report.comparison import read_groups
from tests.program import TINY, fastuda

LACKING = (9, 14, 16)
"""Terrain, truck and train, which SYNTHIA's benchmark does not have."""


def cityscapes_confusion() -> np.ndarray:
    """19 x 19, rows = truth, like that of a network which never predicts the three classes: terrain becomes
    vegetation, sidewalk and wall, truck bus and car, train bus and building."""
    pixels = np.array((2000, 330, 1250, 36, 48, 76, 13, 39, 1050, 66, 200, 85, 12, 400, 24, 28, 11, 6, 29))
    shares = pixels / pixels.sum()
    matrix = 0.25 * pixels[:, None] * shares + np.diag(0.7 * pixels)
    matrix[:, LACKING] = 0
    for truth, parts in {9: {8: 20, 1: 40, 3: 6}, 14: {13: 8, 15: 16}, 16: {15: 9, 2: 2}}.items():
        matrix[truth] = 0
        for predicted, count in parts.items():
            matrix[truth, predicted] = count
    return (1000 * matrix).astype(np.int64)


def mean_iou(matrix: np.ndarray, chosen: tuple[int, ...]) -> float:
    """``np.mean`` of the chosen entries of tp / (row + column - tp), in percent."""
    hit = np.diag(matrix)
    with np.errstate(invalid="ignore"):
        iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)
    return 100 * iou[list(chosen)].mean()


def test_the_two_protocols_are_the_authors():
    """ASANet and WeakSegDA pick 16 and 13 from the IoUs of all 19 rows; PLCA and FADA have set the labels of
    the three classes to 255, which takes their rows out."""
    full = cityscapes_confusion()
    ignoring = full.copy()
    ignoring[list(LACKING)] = 0
    wanted = {
        name: [mean_iou(matrix, chosen) for chosen in (SYNTHIA_16, SYNTHIA_13)]
        for name, matrix in {"confusion19": full, "ignore": ignoring}.items()
    }
    gap = np.subtract(wanted["ignore"], wanted["confusion19"])
    assert (gap > 1).all() and (gap < 4).all()  # as far apart as 55.56 / 59.92 and 57.37 / 62.15

    inside = torch.from_numpy(full[np.ix_(SYNTHIA_16, SYNTHIA_16)])
    others = torch.from_numpy(full[np.ix_(LACKING, SYNTHIA_16)].sum(0))
    names = [CITYSCAPES.names[i] for i in SYNTHIA_16]
    for protocol, other in (("confusion19", "ignore"), ("ignore", "confusion19")):
        scores = Scores.of(inside, names, others, protocol)
        means = scores.protocols()
        assert list(means) == ["mIoU16", "mIoU13", f"mIoU16_{other}", f"mIoU13_{other}"]
        assert [means["mIoU16"], means["mIoU13"]] == pytest.approx(wanted[protocol])
        assert [means[f"mIoU16_{other}"], means[f"mIoU13_{other}"]] == pytest.approx(wanted[other])
        assert scores.as_dict()["protocol"] == protocol and f"iou_{other}" in scores.as_dict()
        rows = [line.split()[0] for line in table({"run": scores}).splitlines()]
        assert rows[-4:] == list(means)
        car = scores.only(("car",))
        assert car.other_iou == (scores.other_iou[names.index("car")],) and car.protocol == protocol


def test_nineteen_classes_that_never_predict_the_three_score_as_sixteen_by_confusion19():
    full = cityscapes_confusion()
    means = Scores.of(torch.from_numpy(full), CITYSCAPES.names).protocols()
    assert means["mIoU16"] == pytest.approx(mean_iou(full, SYNTHIA_16))
    assert means["mIoU13"] == pytest.approx(mean_iou(full, SYNTHIA_13))
    assert not any("_" in name for name in means)


def test_evaluated_domains_keep_the_classes_that_the_run_lacks(scenes_root):
    """But the split that is trained on, whose labels weak labels are made of, does not."""
    source = open_domain("scenes", role="source", data_root=scenes_root)
    target = open_domain("scenes", role="target", data_root=scenes_root)
    held_out = open_domain("scenes", role="evaluation", data_root=scenes_root)
    full = held_out.read_label(0)
    _, trained, evaluated = share_classes(source, target, held_out, classes=("road", "sky", "car"))
    assert trained.others == () and set(trained.label_map.ids.values()) == {0, 1, 2, 255}
    assert set(evaluated.others) == set(CITYSCAPES.names) - {"road", "sky", "car"}
    label = evaluated.read_label(0)
    assert ((label == 3) == ((full != 255) & ~np.isin(full, (0, 10, 13)))).all()
    assert ((label == 255) == (full == 255)).all() and (label == 3).any()
    everything, known = held_out.in_classes(held_out.classes)
    assert everything.others == () and known == CITYSCAPES.names


def test_command(scenes_root, tmp_path):
    """A run of three classes, scored on a target with more, against its own predictions counted by hand."""
    out = tmp_path / "run"
    done = fastuda(
        "train", "--data-root", scenes_root, "--out", out, "--steps", 2, *TINY,
        "data.classes=[road, sky, car]", "eval.protocol=confusion19", "eval.pictures=1",
        "log.report=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    _, _, classes = load_run(out, torch.device("cpu"))
    domain = open_domain("scenes", role="evaluation", data_root=scenes_root, split="auto")
    done = fastuda("predict", out, *[i.image for i in domain.items], "--out", tmp_path / "p", "--quiet")
    assert done.returncode == 0, done.stderr
    files = {path.stem: path for path in (tmp_path / "p").rglob("*.png")}
    matrix = np.zeros((19, 19), np.int64)
    own = np.array([CITYSCAPES.names.index(name) for name in classes.names])
    for i, item in enumerate(domain.items):
        label = domain.read_label(i)
        predicted = own[np.asarray(Image.open(files[item.image.stem]))]
        kept = label != 255
        np.add.at(matrix, (label[kept], predicted[kept]), 1)
    ignoring = matrix.copy()
    ignoring[[i for i in range(19) if i not in own]] = 0
    wanted = {"confusion19": mean_iou(matrix, own), "ignore": mean_iou(ignoring, own)}
    assert wanted["ignore"] - wanted["confusion19"] > 1

    result = read_result(out / "result.json")
    assert result["protocol"] == "confusion19"
    assert result["mIoU3"] == pytest.approx(wanted["confusion19"], abs=0.02)
    assert result["mIoU3_ignore"] == pytest.approx(wanted["ignore"], abs=0.02)
    again = scores_of(result)
    assert again.protocols() == pytest.approx({k: result[k] for k in ("mIoU3", "mIoU3_ignore")}, abs=1e-3)
    with (out / "metrics.csv").open() as file:
        curves = {row["name"]: float(row["value"]) for row in csv.DictReader(file)}
    assert curves["val/mIoU3_ignore"] == pytest.approx(result["mIoU3_ignore"], abs=1e-3)
    report = (out / "report.html").read_text()
    assert "by confusion19" in report and "by ignore: pixels of classes that the run lacks" in report

    done = fastuda("evaluate", out, "--csv", tmp_path / "scores.csv")
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.strip()}
    for name in ("mIoU3", "mIoU3_ignore"):
        assert rows[name] == f"{result[name]:.1f}"
    assert done.stdout.splitlines()[-1].startswith("by confusion19: pixels of sidewalk, building,")
    with (tmp_path / "scores.csv").open() as file:
        for row in csv.DictReader(file):
            assert float(row["iou"]) == pytest.approx(result["iou"][row["class"]], abs=1e-3)
            assert float(row["iou_ignore"]) == pytest.approx(result["iou_ignore"][row["class"]], abs=1e-3)
    done = fastuda("evaluate", out, "eval.protocol=ignore", "--json")
    scored = json.loads(done.stdout)
    assert scored["protocol"] == "ignore"
    assert (scored["mIoU3"], scored["mIoU3_confusion19"]) == (result["mIoU3_ignore"], result["mIoU3"])
    done = fastuda("evaluate", out, "--ccd", "--json")
    _, method, _ = load_run(out, torch.device("cpu"))
    bare = domain.renumber(classes, {number: i for i, number in enumerate(own.tolist())})
    statistics = None
    with torch.no_grad():
        for image, label, _ in eval_loader(bare, DataConfig(workers=0), method.model.input):
            assert set(label.unique().tolist()) <= {0, 1, 2, 255}
            one = feature_statistics(method, image.contiguous(memory_format=torch.channels_last), label, None)
            statistics = one if statistics is None else statistics.merge(one)
    distances = class_centre_distance(statistics).tolist()
    assert list(json.loads(done.stdout)["ccd"].values()) == pytest.approx(distances, rel=1e-4)
    done = fastuda("evaluate", out, "eval.protocol=confusion16")
    assert done.returncode == 2
    assert "eval.protocol is 'confusion16': choose ignore or confusion19" in done.stderr

    own, other = (read_groups([tmp_path], protocol)[0] for protocol in (None, "ignore"))
    assert own.domains.endswith(", confusion19") and other.domains.endswith(", ignore")
    assert list(own.scores) == ["mIoU3", *classes.names]
    assert own.scores["mIoU3"] == (result["mIoU3"],) and other.scores["mIoU3"] == (result["mIoU3_ignore"],)
    assert other.scores["car"] == (result["iou_ignore"]["car"],)


def test_runs_of_unlike_protocols_are_compared_by_one(tmp_path):
    names = [CITYSCAPES.names[i] for i in SYNTHIA_16]
    full = cityscapes_confusion()
    inside = torch.from_numpy(full[np.ix_(SYNTHIA_16, SYNTHIA_16)])
    others = torch.from_numpy(full[np.ix_(LACKING, SYNTHIA_16)].sum(0))
    for name in ("plca", "asanet"):
        config = resolve(f"synthia_cityscapes_{name}", {}, {})
        scores = Scores.of(inside, names, others, config.eval.protocol)
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(config.to_yaml())
        text = json.dumps({"step": 1, "split": "val", "classes": names} | scores.as_dict())
        (run / "result.json").write_text(text)
    both = [group.scores for group in read_groups([tmp_path])]
    assert len(both) == 2 and both[0] == both[1]
    assert both[0]["mIoU16"][0] == pytest.approx(scores.protocols()["mIoU16_ignore"], abs=1e-3)
    assert {group.domains for group in read_groups([tmp_path])} == {"synthia -> cityscapes (val), ignore"}


def test_the_line_names_what_is_counted():
    scores = Scores(("road",), (50.0,), other_iou=(40.0,))
    assert protocol_line(scores, ("truck", "train")) == "by ignore: pixels of truck, train are left out"
    assert "pixels of a, b, c, d, e and 2 more classes" in protocol_line(scores, tuple("abcdefg"))


def published(name: str) -> object:
    return resolve(name, {}, {})


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith(("gta5_", "synthia_", "cityscapes_"))])
def test_every_recipe_is_scored_as_its_authors_score(name):
    method = str(published(name).method["name"])
    wanted = "ignore" if method in ("plca", "fada") else "confusion19"
    assert published(name).eval.protocol == wanted
    assert "protocol" in json.dumps(load_yaml(name).get("eval", {}))  # said, not left to the default


SELF_TRAINED = [n for n in shipped() if ("sepico" in n or "self_training" in n) and "_base" not in n]
SIZES = {"gta5": (704, 1280), "synthia": (760, 1280), "cityscapes": (640, 1280)}
LEAST = {"gta5": 3000 / (1052 * 1914), "synthia": 3000 / (760 * 1280), "cityscapes": 3000 / (1024 * 2048)}


@pytest.mark.parametrize("name", SELF_TRAINED)
def test_sepico_and_self_training_as_in_the_authors_code(name):
    run = published(name)
    assert run.data.source_size == SIZES[run.data.source]
    assert run.data.rare_share == pytest.approx(LEAST[run.data.source], rel=0.01)
    assert run.data.rare_crop_share == pytest.approx(1500 / 640**2, rel=1e-3)
    if run.model.backbone == "resnet101":
        assert run.model.aspp_bias and run.model.aspp_zero_bias and run.model.aspp_init_std == 0.01


def test_vgg16_recipes_as_in_the_authors_code():
    for source in ("gta5", "synthia"):
        assert published(f"{source}_cityscapes_fada_vgg16").model.input == "caffe_vgg"
        run = published(f"{source}_cityscapes_asanet_vgg16")
        assert run.model.input == "caffe_swapped"
        assert (run.optim.lr, run.optim.head_lr_mult) == (2.5e-4, 1)
    assert INPUTS["caffe_vgg"].mean == (103.939, 116.779, 123.68)
    assert (INPUTS["caffe_vgg"].channel_order, INPUTS["caffe_vgg"].scale) == ("bgr", 255.0)


@pytest.mark.parametrize("name", ["asanet_base", "weakseg_base"])
def test_learning_rates_of_the_family_of_adaptsegnet(name):
    optim = published(name).optim
    assert optim.lr == pytest.approx(3 * 2.5e-4)  # three visits a step
    assert optim.lr * optim.head_lr_mult == pytest.approx(10 * 2.5e-4, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in shipped() if "weakseg" in name])
def test_weakseg_tags_of_the_source_as_in_the_authors_code(name):
    wanted = 0.218 if name.startswith("gta5") else 0.1
    assert published(name).method_config().tag_share == wanted
    assert isinstance(published(name).method_config(), get_method("weakseg").Config)


def test_where_the_bias_of_a_fresh_head_starts():
    """FADA, ASANet and WeakSegDA draw the weights of the head anew and leave the bias; mmcv zeroes it."""
    for name in ("fada_base", "asanet_base", "weakseg_base", "sepico_base"):
        model = published(name).model
        head = ASPP(64, 19, model.aspp_branches, model.aspp_bias, model.aspp_init_std, model.aspp_zero_bias)
        bias = torch.cat([conv.bias for conv in head.convs])
        if name == "sepico_base":
            assert not bias.any()
        else:
            assert 0.5 < bias.std() * (3 * 64 * 9) ** 0.5 < 1.5  # uniform within 1 / sqrt(fan in)


def test_fresh_layers_of_vgg16_start_as_torch_does():
    torch.manual_seed(0)
    made = VGG16()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    init_scratch(made)
    for key, value in made.state_dict().items():
        assert value.equal(before[key]) == key.startswith(("fc6", "fc7"))
