"""The command lines, as a user meets them: a whole run, and every kind of bad input."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastuda import __version__
from fastuda.__main__ import COMMANDS
from tests.program import ROOT, TINY, command, curves, environment, fastuda, in_a_process


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_root):
    """A finished run with its source-only baseline."""
    out = tmp_path_factory.mktemp("runs") / "plca"
    args: list = list(TINY[:7])
    done = fastuda(
        "train", "--method", "plca", "--amp", "--data-root", scenes_root, "--out", out, "--steps", 3, *args
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_prints_both_methods_and_leaves_its_folder(run):
    out, done = run
    assert "source_only" in done.stdout and "plca" in done.stdout and "gain" in done.stdout
    assert "mIoU19" in done.stdout and "mIoU16" in done.stdout and "mIoU13" in done.stdout
    files = (
        "config.yaml env.txt log.txt metrics.csv checkpoints/last.pt checkpoints/best.pt model.safetensors"
    )
    for name in [*files.split(), "result.json", "table.txt", "source_only/result.json"]:
        assert (out / name).stat().st_size > 0, name
    assert any((out / "tb").iterdir())
    pictures = sorted((out / "preds").glob("*.png"))
    assert len(pictures) == 3 and Image.open(pictures[0]).size == (3 * 64 + 8, 32)
    names = {name for _, name, _ in curves(out)}
    assert {"train/ce", "train/loss", "train/feature_association", "val/mIoU19", "lr/model"} <= names
    assert not list(out.rglob(".*.draft*"))
    assert f"(open {out / 'report.html'})" in done.stdout and (out / "report.html").is_file()


def test_the_saved_configuration_is_a_configuration(run, tmp_path):
    out, _ = run
    done = fastuda("train", "--config", out / "config.yaml", "--print-config")
    assert done.returncode == 0 and yaml.safe_load(done.stdout) == yaml.safe_load(
        (out / "config.yaml").read_text()
    )


def test_evaluate(run, tmp_path):
    out, _ = run
    done = fastuda("evaluate", out, "--json", "--csv", tmp_path / "iou.csv", "--pictures", 2)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    trained = json.loads((out / "result.json").read_text())
    assert result["mIoU19"] == pytest.approx(trained["mIoU19"], abs=1.0)
    assert (tmp_path / "iou.csv").read_text().startswith("class,iou")
    assert len(list((out / "preds_val").iterdir())) == 2
    plain = fastuda("evaluate", out, "method.test_aggregation=false")
    assert plain.returncode == 0 and "plca" in plain.stdout


@pytest.mark.parametrize(
    "setting", ["data.workers=-1", "data.eval_size=[0, 0]", "method.aggregation_alpha=2"]
)
def test_evaluate_checks_numbers(setting, run):
    done = fastuda("evaluate", run[0], setting)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {setting.partition('=')[0]} is")


@pytest.mark.parametrize("place", ["file/iou.csv", "folder", "/dev/full", "/proc/iou.csv"])
def test_a_csv_that_cannot_be_written(place, run, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    done = fastuda("evaluate", run[0], "--csv", tmp_path / place)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write "), done.stderr
    assert "mIoU19" in done.stdout  # the scores are not lost
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_a_csv_in_a_new_folder(run, tmp_path):
    assert fastuda("evaluate", run[0], "--csv", tmp_path / "a" / "iou.csv", "--quiet").returncode == 0
    assert (tmp_path / "a" / "iou.csv").read_text().startswith("class,iou\n")


def test_evaluate_shows_how_far_it_is(run):
    done = fastuda("evaluate", run[0], "--json", "--classes", "road", "road")
    assert "evaluating: 100%" in done.stderr and "3/3" in done.stderr, done.stderr
    assert list(json.loads(done.stdout)) == ["mIoU1", "iou"]
    assert fastuda("evaluate", run[0], "--json", "--quiet").stderr == ""
    done = fastuda("evaluate", run[0], "--pictures", -1)
    assert done.returncode == 2 and done.stderr == "error: --pictures is -1; it must be at least 0\n"


def test_predict(run, scenes_root, tmp_path):
    out, _ = run
    (tmp_path / "in" / "sub").mkdir(parents=True)
    image = next((scenes_root / "scenes" / "gta5" / "images").iterdir())
    (tmp_path / "in" / "sub" / "a.png").write_bytes(image.read_bytes())
    done = fastuda("predict", out, tmp_path / "in", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 0, done.stderr
    labels = np.asarray(Image.open(tmp_path / "out" / "labels" / "sub" / "a.png"))
    color = Image.open(tmp_path / "out" / "color" / "sub" / "a.png")
    assert labels.shape == (32, 64) and labels.max() < 19
    assert color.mode == "P" and np.array_equal(np.asarray(color), labels)
    assert np.asarray(Image.open(tmp_path / "out" / "overlay" / "sub" / "a.png")).shape == (32, 64, 3)


def test_predict_needs_only_weights_and_configuration(run, scenes_root, tmp_path):
    out, _ = run
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / "run" / name).write_bytes((out / name).read_bytes())
    image = next((scenes_root / "scenes" / "gta5" / "images").iterdir())
    done = fastuda("predict", tmp_path / "run", image, "--out", tmp_path / "p", "--save", "labels", "--quiet")
    assert done.returncode == 0 and len(list((tmp_path / "p").rglob("*.png"))) == 1


def test_env_names_every_op():
    done = fastuda("env")
    assert done.returncode == 0
    words = "fastuda 0|torch 2|GPU|C++ extension|cycle_association_loss|reference  usable|apex"
    for word in words.split("|"):
        assert word in done.stdout, word
    built = re.search(r"^C\+\+ extension: loaded \((.*)\)$", done.stdout, re.MULTILINE)
    assert built is None or all(word in built[1] for word in ("torch 2.", "-O3", "-fopenmp")), built


def test_env_for_a_script():
    said = json.loads(fastuda("env", "--json").stdout)
    assert said["packages"]["torch"].startswith("2.") and said["cpu"]["cores"] >= 1
    last = said["ops"]["cycle_match"][-1]
    assert last.items() >= {"name": "reference", "usable": True, "reason": "usable"}.items()
    assert all(row["why"] for row in said["ops"]["cycle_match"])


def test_one_command_for_all():
    done = fastuda("__main__", "--help")
    assert done.returncode == 0 and all(name in done.stdout for name in ("train", "compare", "data"))
    assert "  completion  a script" in done.stdout
    assert fastuda("__main__").returncode == 2
    assert fastuda("__main__", "--version").stdout == f"fastuda {__version__}\n"
    done = fastuda("__main__", "trian")
    assert done.returncode == 2 and "unknown command 'trian'; did you mean train" in done.stderr
    assert "scenes" in fastuda("__main__", "train", "--list-configs").stdout
    assert "gta5" in fastuda("__main__", "data", "list").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    done = fastuda("__main__", command, "--help")
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr
    assert re.search(rf"(python -m fastuda\.|fastuda ){command} ", done.stdout.partition("examples:")[2])


def test_flags_are_settings():
    done = fastuda("train", "--model", "daformer", "--backbone", "mit_b0", "--crop", 64, 96, "--print-config")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert (config["model"]["head"], config["model"]["backbone"]) == ("daformer", "mit_b0")
    assert config["data"]["crop"] == [64, 96]


def test_shipped_configurations_resolve():
    names = fastuda("train", "--list-configs").stdout.split()
    assert {"scenes", "gta5_cityscapes_plca", "synthia_cityscapes_plca", "camvid_dusk_day"} <= set(names)
    from fastuda.config.resolve import resolve

    for name in names:
        config = resolve(name, {}, {})
        assert config.method_config() is not None
    published = resolve("gta5_cityscapes_plca", {}, {})
    assert (published.train.steps, published.optim.horizon, published.data.crop) == (10416, 11160, (730, 730))
    assert published.method_config().lovasz_weight == 3.0


BAD = [
    (["--method", "pcla"], "unknown method 'pcla'; did you mean plca"),
    (["--method", "plca,"], "unknown method ''"),
    (["--method", ":"], "unknown method ':'"),
    (["--method", ".a:B"], "unknown method '.a:B'"),
    (["--config", ""], "there is no configuration named ''"),
    (["--weights", ""], "no weights file at"),
    (["--source", "gta:x"], "unknown domain 'gta'; did you mean gta5"),
    (["--backbone", "resnet_50"], "unknown backbone 'resnet_50'; did you mean resnet50"),
    (["optim.learning_rate=1"], "unknown setting 'optim.learning_rate'"),
    (["method.lovasz=1"], "unknown setting 'method.lovasz'; did you mean lovasz_weight"),
    (["optim.lr=fast"], "optim.lr must be float, got 'fast'"),
    (["train.steps=1.5"], "train.steps must be int, got 1.5"),
    (["lr"], "'lr' is neither a flag nor key=value"),
    (["--source", "gta5:/no/such/folder"], "no folder /no/such/folder"),
    (["--weights", "/no/such/file.pth"], "no weights file at /no/such/file.pth"),
    (["--config", "no_such_config"], "there is no configuration named 'no_such_config'"),
    (["--config", "no_such.yaml"], "no configuration file no_such.yaml"),
    (["--device", "cuda:7"], "finds no CUDA device"),
    (["--device", "meta"], "finds no META device here; choose auto, cpu"),
    (["--device", "hpu"], "finds no HPU device"),
    (["--device", "xpu:0"], "finds no XPU device"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--resume", "auto"], "--resume auto needs --out"),
    (["--resume", "/no/such/last.pt"], "no checkpoint at /no/such/last.pt"),
    (["data.eval_split=test"], "no images for split 'test'"),
    (["optim.name=lion"], "optim.name is 'lion': choose sgd, adamw or adam"),
    (["optim.schedule=cosine"], "optim.schedule is 'cosine': choose poly or constant"),
    (["--loader", "tf"], "data.loader is 'tf': choose auto, torch or dali"),
    (["optim.impl=apex"], "optim.impl=apex needs NVIDIA apex"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_gives_one_clear_line(args, message, scenes_root, tmp_path, capsys, monkeypatch):
    if args == ["--device", "cuda:7"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    from fastuda import cli, train

    out = tmp_path / "run"
    full = [
        "train",
        *(args if args[-1] == "auto" else [*args, "--out", str(out)]),
        "--data-root",
        str(scenes_root),
    ]
    monkeypatch.setattr("sys.argv", [*full, "--quiet", "--steps", "1", *TINY[:7]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err, err
    assert not out.exists() and not (tmp_path / "runs").exists()


def test_a_traceback_never_shows_and_the_exit_code_is_two(tmp_path):
    done = in_a_process("train", "--method", "pcla")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("train", ["--crop", "64"], "argument --crop: expected 2 arguments"),
        ("train", ["--steps", "1e3"], "argument --steps: invalid int value: '1e3'"),
        ("train", ["--stepz", "1"], "unrecognized arguments: --stepz"),
        ("train", ["--out", ""], "argument --out: the path is empty"),
        ("evaluate", [], "the following arguments are required: run"),
        ("evaluate", [""], "argument run: the path is empty"),
        ("predict", ["run", "", "--out", "x"], "argument images: the path is empty"),
        ("compare", ["--jsno", "."], "unrecognized arguments: --jsno"),
        ("data", ["check"], "the following arguments are required"),
    ],
)
def test_a_word_that_is_refused_is_one_line(name, args, message):
    done = fastuda("__main__", name, *args)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert done.stderr.endswith("; see --help\n") and len(done.stderr.splitlines()) == 1


def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("train", "--list-configs"), env=environment(), stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2 and done.stderr == b"error: the output: No space left on device\n"


def test_an_existing_run_folder_is_left_alone(run, scenes_root):
    out, _ = run
    before = (out / "result.json").read_bytes()
    done = fastuda("train", "--data-root", scenes_root, "--out", out, "--steps", 1, *TINY)
    assert done.returncode == 2 and "is not empty; choose another --out" in done.stderr
    assert (out / "result.json").read_bytes() == before


def test_weights_of_another_network(scenes_root, tmp_path):
    from fastuda.models.backbones import BACKBONES

    torch.save(BACKBONES["resnet18"](False).state_dict(), tmp_path / "resnet18.pth")
    args = ["--weights", tmp_path / "resnet18.pth", "--data-root", scenes_root, "--out", tmp_path / "run"]
    done = fastuda("train", *args, "--steps", 1, *TINY)
    assert done.returncode == 2 and "resnet18.pth does not fit this backbone" in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_space_left(scenes_root, tmp_path):
    """A file-size limit stands in for a full disk: the kernel refuses the write either way."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    out = tmp_path / "run"
    done = fastuda(
        "train", "--data-root", scenes_root, "--out", out, "--steps", 2, *TINY, preexec_fn=limit
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == f"error: cannot write {out / 'checkpoints' / 'last.pt'}: File too large"
    )
    assert "Traceback" not in done.stderr
    assert os.listdir(out / "checkpoints") == []


def test_a_loss_that_is_not_finite_names_itself_and_keeps_the_checkpoint(scenes_root, tmp_path):
    out = tmp_path / "run"
    args = ["--data-root", scenes_root, "--out", out, "--steps", 40, *TINY]
    done = fastuda("train", *args, "--lr", 1e18, "checkpoint.every=1", "optim.warmup=0")
    assert done.returncode == 2 and "the loss is not finite" in done.stderr and ".png" in done.stderr, (
        done.stderr
    )
    assert torch.load(out / "checkpoints" / "last.pt", weights_only=True)["step"] >= 1


def test_runs_from_anywhere(tmp_path, scenes_root):
    done = fastuda("env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tmp_path != ROOT


def test_amp_before_a_dotted_setting():
    done = fastuda("train", "--method", "sepico", "--amp", "train.steps=20", "--print-config")
    assert done.returncode == 0 and "amp: bf16" in done.stdout and "steps: 20" in done.stdout, done.stderr
