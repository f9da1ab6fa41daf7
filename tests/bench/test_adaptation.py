"""The table of adaptation gains: a row a run, nothing run twice, the page made from the rows."""

from __future__ import annotations

import csv
import sys

import pytest
import yaml

from bench import adaptation, gains, plot
from fastuda import cli
from fastuda.config.resolve import resolve
from fastuda.errors import UserError
from fastuda.inference.scores import Scores

RECIPE = {
    "data": {"source": "scenes", "target": "scenes", "crop": [32, 64], "batch_size": 2, "workers": 0},
    "model": {"backbone": "small"},
    "train": {"steps": 1},
    "log": {"report": False, "tensorboard": False},
    "eval": {"pictures": 0},
}


@pytest.fixture
def bench(tmp_path, scenes_root, monkeypatch, capsys):
    """``python -m bench.adaptation`` on tiny scenes; gives its exit code, output and errors."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "data_root": str(scenes_root)}}))
    monkeypatch.setattr(gains, "PAGE", tmp_path / "page.md")

    def go(*words):
        common = ["--config", recipe, "--target", "scenes", "--csv", tmp_path / "rows.csv", "--quiet"]
        argv = ["adaptation", *common, "--runs", tmp_path / "runs", *words]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as stop:
            cli.run(adaptation.main)
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return go


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_a_run_and_none_twice(bench, tmp_path):
    code, said, _ = bench("--seeds", "0", "--method", "source_only", "method.lovasz_weight=1")
    assert code == 0 and said.startswith("0 of 1 runs have a row")
    (row,) = rows(tmp_path / "rows.csv")
    key = {name: row[name] for name in ("method", "settings", "seed", "steps", "precision")}
    assert list(key.values()) == ["source_only", "method.lovasz_weight=1", "0", "1", "float32"]
    assert float(row["minutes"]) >= 0 and 0 <= float(row["mIoU"]) <= 100 and row["machine"]
    ran = tmp_path / "runs" / "source_only_method.lovasz_weight=1_1_0"
    result = yaml.safe_load((ran / "result.json").read_text())
    assert float(row["mIoU"]) == pytest.approx(result[f"mIoU{len(result['classes'])}"], abs=0.01)
    assert {name: float(row[name]) for name in result["iou"] if row[name] != "nan"} == pytest.approx(
        {name: value for name, value in result["iou"].items() if value is not None}, abs=0.01
    )

    # elsewhere, with the rows and without the run folders, only what is missing is trained
    (tmp_path / "runs").rename(tmp_path / "gone")
    code, said, _ = bench("--seeds", "0", "1", "--method", "source_only", "method.lovasz_weight=1")
    assert code == 0 and said.startswith("1 of 2 runs have a row")
    assert [row["seed"] for row in rows(tmp_path / "rows.csv")] == ["0", "1"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["source_only_method.lovasz_weight=1_1_1"]


def test_the_whole_table_goes_seed_by_seed_and_bounds_it_by_the_target(tmp_path):
    args = adaptation.build_parser().parse_args(
        ["--config", "scenes", "--source", "scenes", "--target", "folder:T", "--seeds", "0", "1"]
    )
    runs = adaptation.runs_of(args)
    assert len(runs) == 2 * len(adaptation.TABLE) == len({run.out for run in runs})
    assert [run.config.train.seed for run in runs] == sorted(run.config.train.seed for run in runs)
    bound = next(run for run in runs if run.settings == "data.source=TARGET")
    assert bound.config.data.source == "folder:T" and runs[0].config.data.source == "scenes"
    assert all(run.config.train.baseline == "off" for run in runs)
    mixed = ["--method", "source_only", "data.source=SOURCE,TARGET:few.txt", "data.source_weights=[1,1]"]
    args = adaptation.build_parser().parse_intermixed_args(
        ["--config", "scenes", "--source", "scenes", "--target", "folder:T", "--seeds", "0", *mixed]
    )
    (few,) = adaptation.runs_of(args)
    assert few.config.data.source == "scenes,folder:T:few.txt" and few.settings.startswith(
        "data.source=SOURCE,"
    )
    lsr = next(run for run in runs if run.settings == "method.lsr_weight=0")
    assert lsr.config.method_config().lsr_weight == 0


def test_minutes_are_those_of_the_steps(tmp_path):
    text = "step,name,value\n10,perf/step_s,3.0\n10,train/loss,9\n15,perf/step_s,6.0\n"
    (tmp_path / "metrics.csv").write_text(text)
    assert adaptation.minutes(tmp_path) == pytest.approx((10 * 3 + 5 * 6) / 60)


def _row(method, seed, miou, settings=""):
    run = adaptation.Run(method, settings, resolve("scenes", {"train.seed": seed}, {}), None)
    about = dict.fromkeys(gains.ABOUT, "x") | {"minutes": "5"}
    key = dict(zip(("method", "settings", "seed", "steps"), run.key, strict=True))
    return about | key | {"mIoU": str(miou), "road": str(miou), "car": "nan"}


def test_table_says_the_gain_and_its_standard_error():
    found = [_row("plca", 0, 33), _row("plca", 1, 35), _row("source_only", 0, 30), _row("source_only", 1, 30)]
    found.append(_row("source_only", 0, 60, "data.source=TARGET"))
    lines = gains.table(found).splitlines()
    assert lines[2].startswith("| `source_only` |  | 250 | 0, 1 | **30.0 ± 0.0** |  | 30.0 ± 0.0 |  | 5.0")
    # deviations of 1.414 and 0 over two seeds each
    assert "| `plca` |  | 250 | 0, 1 | **34.0 ± 1.4** | +4.0 ± 1.0 |" in lines[3]
    assert "| the target's own labels | 250 | 0 | **60.0** | +30.0 |" in lines[4]


def test_the_page_is_made_from_the_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(gains, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    text = "# Top\n\n<!-- rows pair -->\nold\n<!-- end -->\nkept\n"
    assert gains.page(text) == "# Top\n\n<!-- rows pair -->\n\nNot measured.\n\n<!-- end -->\nkept\n"
    row = _row("plca", 0, 33)
    adaptation.append_rows(tmp_path / "results" / "pair.csv", list(row), [row])
    made = gains.page(text)
    assert "| `plca` |" in made and "old" not in made and made == gains.page(made)
    assert gains.load(tmp_path / "results" / "pair.csv") == [row]


def test_the_shipped_page_is_made_from_the_shipped_rows():
    text = gains.PAGE.read_text()
    assert "<!-- rows idda_cityscapes -->" in text
    assert gains.page(text) == text, "run python -m bench.adaptation --table"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method pcla", "unknown method 'pcla'"),
        ("method.lsr_weight=0", "settings are of the methods that --method names"),
        ("--csv FILE", "FILE has other columns than this bench"),
    ],
)
def test_what_cannot_be_trained_is_one_line(words, message, bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a,b\n")
    code, _, err = bench(*words.split())
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err


def test_the_row_holds_every_class(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,name,value\n400,perf/step_s,0.3\n")
    config = resolve("scenes", {"train.amp": "bf16"}, {})
    (tmp_path / "config.yaml").write_text(config.with_train(amp="off").to_yaml())  # emulated there
    run = adaptation.Run("plca", "", config, tmp_path)
    row = adaptation.row_of(run, Scores(("road", "car"), (50.0, 25.126)), "abc1234")
    assert tuple(row) == adaptation.columns(("road", "car"))
    assert (row["mIoU"], row["car"], row["minutes"], row["commit"]) == ("37.56", "25.13", "2.0", "abc1234")
    assert row["precision"] == "float32"


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ("", "weakseg"),
        ("data.source=TARGET", "weakseg, the target's own labels"),
        ("method.weak_labels=points data.weak_labels=p.csv eval.logit_adjustment=0", "weakseg, points"),
        ("method.mask_ratio=0.7 method.mask_block=32", "weakseg, mask_ratio=0.7 mask_block=32"),
    ],
)
def test_a_bar_of_the_picture_is_named_by_method_and_settings(settings, label):
    assert plot.label_of({"method": "weakseg", "settings": settings}) == label


def test_the_picture_of_the_gains_is_drawn_from_the_rows(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(gains, "PAGE", tmp_path / "results.md")
    (tmp_path / "assets" / "pictures").mkdir(parents=True)
    assert plot.bars(pyplot).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plot, "PAIR", "nothing")
    with pytest.raises(UserError, match=r"nothing\.csv has no row of source_only"):
        plot.bars(pyplot)
