"""Runs on networks of transformers and of users: trained, stopped, resumed, evaluated and exported without
the folder that they came from."""

import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastuda.data.config import DataConfig
from fastuda.data.domains.run import open_run
from tests.engine.runs import arguments, refused, trainer
from tests.models.foreign import saved_backbone, saved_model
from tests.program import ROOT, environment, equal, fastuda, state, without_clocks

NETWORKS = {
    "dinov2": ("--backbone", lambda folder: saved_backbone(folder, "dinov2"), "self_training"),
    "segformer": ("--model", saved_model, "plca"),
    "mine": ("--model", lambda folder: "tests.models.own:contract", "source_only"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def finished(request, tmp_path_factory, scenes_root):
    """Name, arguments, run folder; the network's folder is gone."""
    place = tmp_path_factory.mktemp(request.param)
    flag, make, method = NETWORKS[request.param]
    more = ["--method", method, flag, make(place / "network"), "optim.name=adamw"]
    if request.param == "dinov2":
        more += ["method.flip_pseudo_label=true", "optim.layer_decay=0.9", "model.enlarge=1.1"]
        more += ["method.mask_ratio=0.7", "method.mask_kind=tokens"]
    done = fastuda("train", *arguments(scenes_root, place / "run", *more))
    assert done.returncode == 0, done.stderr
    half = ["checkpoint.keep=3", *more]
    done = fastuda("train", *arguments(scenes_root, place / "half", "--steps", 1, *half))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "network", ignore_errors=True)
    return request.param, place


@pytest.mark.parametrize("name", ["deep", "shared"])
def test_any_parameters_can_be_trained_and_saved(name, scenes_root, tmp_path):
    more = ["--model", f"tests.models.own:{name}", "--method", "self_training", "--steps", 1]
    done = fastuda("train", *arguments(scenes_root, tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr


def test_resumed_without_the_folder_is_undisturbed(finished):
    """Bit for bit, from the settings and the checkpoint alone."""
    _, place = finished
    again = fastuda("train", "--out", place / "half", "--resume", "auto", "--steps", 3, "--quiet")
    assert again.returncode == 0, again.stderr
    whole, resumed = (without_clocks(state(place / name)) for name in ("run", "half"))
    for one in (whole, resumed):
        one["config"]["checkpoint"] = None
        one["best"] = 0.0  # the shorter run was scored at its end
    assert equal(whole, resumed)
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("run", "half")]
    assert weights[0] == weights[1]


def test_a_finished_run_needs_no_folder(finished, tmp_path):
    name, place = finished
    done = fastuda("evaluate", place / "run", "--ccd", "--json")
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 70, 3), np.uint8)).save(tmp_path / "a.png")
    done = fastuda("predict", place / "run", tmp_path / "a.png", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    done = fastuda("report", place / "run")
    assert done.returncode == 0, done.stderr
    done = fastuda("export", place / "run", "--format", "safetensors", "--out", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    done = fastuda("predict", tmp_path / "a.safetensors", tmp_path / "a.png", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    pictures = [next((tmp_path / folder).rglob("*.png")).read_bytes() for folder in ("out", "again")]
    assert pictures[0] == pictures[1]
    done = fastuda("export", place / "run", "--format", "torch", "--out", tmp_path / "a.pt2")
    assert done.returncode == 0 and (tmp_path / "a.pt2").is_file(), f"{name}: {done.stderr}"


def test_a_new_run_says_that_the_folder_is_missing(finished, scenes_root, tmp_path):
    name, place = finished
    if name == "mine":
        shutil.copytree(place / "run", tmp_path / "run")
        text = (place / "run" / "config.yaml").read_text().replace("tests.models.own", "gone.away")
        (tmp_path / "run" / "config.yaml").write_text(text)
        refused(fastuda("evaluate", tmp_path / "run"), "model 'gone.away:contract' cannot be imported")
        return
    done = fastuda(
        "train", *arguments(scenes_root, tmp_path / "new", "--config", place / "run" / "config.yaml")
    )
    done.stderr = done.stderr.splitlines()[-1]  # a warning about its classes comes first
    refused(done, "network", "hf:")


def test_features_stay_near_the_weights_of_the_folder(scenes_root, tmp_path):
    """Without --weights; a resumed run reads the folder again, and only the same one."""
    spec = saved_backbone(tmp_path / "network", "dinov2")
    more = ["--method", "self_training", "--backbone", spec, "method.feature_distance=0.1"]
    more += ["method.feature_classes=null", "checkpoint.keep=3"]
    for name, steps in (("run", 2), ("half", 1)):
        done = fastuda("train", *arguments(scenes_root, tmp_path / name, *more, "--steps", steps))
        assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "half", tmp_path / "third")
    again = fastuda("train", "--out", tmp_path / "half", "--resume", "auto", "--steps", 2, "--quiet")
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "half")]
    assert weights[0] == weights[1]
    other = ["train", "--out", tmp_path / "third", "--resume", "auto", "--steps", 2, "--quiet"]
    saved_backbone(tmp_path / "network", "dinov2", hidden_dropout_prob=0.0, layerscale_value=0.5)
    refused(fastuda(*other), "hf:PATH) are others than when the run began", "give the same file or folder")
    shutil.rmtree(tmp_path / "network")
    refused(fastuda(*other), str(tmp_path / "network"), "cannot be")


def test_swin_is_not_exported_and_says_why(scenes_root, tmp_path):
    spec = saved_backbone(tmp_path / "swin", "swin")
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, out, "--backbone", spec, "--steps", 1))
    assert done.returncode == 0, done.stderr
    refused(
        fastuda("export", out, "--format", "torch", "--out", tmp_path / "x.pt2"),
        "shifted windows of swin",
        "--format safetensors",
    )


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        (["--model", "a.b:c"], {"head": "auto", "network": "a.b:c"}),
        (["--model", "daformer"], {"head": "daformer", "network": None}),
        (["--backbone", "mit_b0"], {"head": "auto", "network": None, "backbone": "mit_b0"}),
    ],
)
def test_the_flag_takes_a_head_or_a_whole_network(flags, model, tmp_path):
    """And either takes the place of a network of the configuration."""
    (tmp_path / "a.yaml").write_text("data: {source: 'gta5:x'}\nmodel: {network: 'd.e:f'}\n")
    done = fastuda("train", "--config", tmp_path / "a.yaml", "--print-config", *flags)
    assert done.returncode == 0, done.stderr
    assert model.items() <= yaml.safe_load(done.stdout)["model"].items()


@pytest.mark.slow
def test_two_processes_train_a_whole_model(scenes_root, tmp_path):
    """Its auxiliary parts get no gradient, which DDP alone would not bear."""
    spec = saved_model(tmp_path / "segformer")
    port = 29500 + os.getpid() % 2000
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{port}", "-m", "fastuda.train",
        *arguments(scenes_root, tmp_path / "run", "--model", spec, "--method", "plca"), "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["processes"] == 2


def weights_of_classes(spec, root, out):
    """Classifier of a new run on the folder: name of a class to its weights."""
    run = trainer(root, out, ("model.network", spec), ("method.name", "source_only"))
    names = run.domains.classes.names
    return dict(zip(names, run.method.model.head.weight[:, :, 0, 0].tolist(), strict=True))


def test_the_classes_of_a_model_are_put_in_the_runs_order(scenes_root, tmp_path, caplog):
    """Whatever their order, case and separators; and what is not there starts from scratch."""
    caplog.set_level(logging.INFO)
    names = open_run(DataConfig(data_root=str(scenes_root))).classes.names
    theirs = [name.title().replace(" ", "_") for name in reversed(names)]
    spec = saved_model(tmp_path / "model", names=theirs)
    saved = load_file(tmp_path / "model" / "model.safetensors")["decode_head.classifier.weight"]
    in_order = dict(zip(names, saved[:, :, 0, 0].tolist()[::-1], strict=True))
    assert weights_of_classes(spec, scenes_root, tmp_path / "run") == in_order
    assert "the rows of its classifier are taken in the run's order, by name" in caplog.text
    assert "from scratch in" not in caplog.text and "no class named" not in caplog.text

    saved_model(tmp_path / "model", names=["boat", *theirs[:-1]])
    caplog.clear()
    rows = weights_of_classes(spec, scenes_root, tmp_path / "other")
    assert f"{spec} has no class named {names[0]}: what its classifier lacks starts" in caplog.text
    moved = load_file(tmp_path / "model" / "model.safetensors")["decode_head.classifier.weight"][1:, :, 0, 0]
    assert [rows[name] for name in names[1:]] == moved.tolist()[::-1]
    assert np.abs(rows[names[0]]).max() < 0.06

    saved_model(tmp_path / "model", names=[f"LABEL_{k}" for k in range(len(names))])
    caplog.clear()
    rows = weights_of_classes(spec, scenes_root, tmp_path / "unnamed")
    assert f"does not name its {len(names)} classes: they must stand in the run's order, {names[0]}," in (
        caplog.text
    )
    saved_model(tmp_path / "model", classes=len(names) + 1)
    caplog.clear()
    weights_of_classes(spec, scenes_root, tmp_path / "more")
    assert f"{len(names) + 1} classes without names, and the run has {len(names)}: the" in caplog.text
