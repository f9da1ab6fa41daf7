"""fastuda.compare: groups, spread, files, messages."""

import csv
import json
import re
import statistics
from xml.etree import ElementTree

import pytest

from fastuda.config.resolve import resolve
from tests.browser import CONTRAST, PROGRAM, Browser, Reader
from tests.program import TINY, fastuda


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one method, one of another with a class that is absent."""
    made = tmp_path / "runs"
    plca = [("plca", 0, 20.0, 1.0), ("plca", 2, 23.0, 3.0), ("plca", 1, 22.0, 2.0)]
    for method, seed, miou, bus in [*plca, ("source_only", 0, 15.0, None)]:
        folder = made / f"{method}_{seed}"
        folder.mkdir(parents=True)
        config = resolve(None, {"method.name": method, "train.seed": seed}, {})
        (folder / "config.yaml").write_text(config.to_yaml())
        result = {
            "step": 4,
            "target": "scenes",
            "split": "val",
            "mIoU19": miou,
            "iou": {"road": 80.0, "bus": bus},
        }
        (folder / "result.json").write_text(json.dumps(result))
    return made


def test_groups_by_method_with_mean_and_spread(runs):
    done = fastuda("compare", runs, "--json")
    assert done.returncode == 0, done.stderr
    source_only, plca = json.loads(done.stdout)
    assert (source_only["method"], plca["method"], plca["seeds"]) == ("source_only", "plca", [0, 1, 2])
    score = plca["scores"]["mIoU19"]
    assert score["values"] == [20.0, 22.0, 23.0]
    assert score["mean"] == pytest.approx(21.667) and score["spread"] == pytest.approx(
        statistics.stdev([20, 22, 23]), abs=1e-3
    )
    assert source_only["scores"]["bus"] == {"mean": None, "spread": None, "values": [None]}


def test_table_and_files(runs, tmp_path):
    done = fastuda("compare", *sorted(runs.iterdir()), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| plca | 0, 1, 2 | 21.7 ± 1.5 | 80.0 ± 0.0 | 2.0 ± 1.0 |" in done.stdout
    assert "| source_only | 0 | 15.0 | 80.0 |  |" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert len(rows) == 12 and {"domains", "method", "seed", "score", "value"} == set(rows[0])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<table>") == page.count("</table>") == 2 and "21.7 ± 1.5" in page
    assert '<th scope="row">bus</th><td></td><td>2.0 ± 1.0</td>' in page  # classes down, methods across
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "")
    svg = (tmp_path / "out" / "comparison.svg").read_text()
    assert svg in page and svg.count("<rect") == 2 and svg.count("<circle") == 4
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert (tmp_path / "out" / "comparison.md").read_text() == done.stdout


def test_words_from_outside_stay_words(runs, tmp_path):
    evil = "</svg></table><script>alert(1)</script>\"'&amp;{{ plot }}"
    for folder in runs.iterdir():
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps({**result, "split": evil, "iou": {evil: 1.0}}))
    assert fastuda("compare", runs, "--out", tmp_path / "out", "--quiet").returncode == 0
    text = (tmp_path / "out" / "comparison.html").read_text()
    page = Reader(text)
    assert page.open == [] and "<script" not in text and page.text.count(evil) == 3  # plot, title, class
    svg = ElementTree.fromstring((tmp_path / "out" / "comparison.svg").read_text())
    assert evil in svg.attrib["aria-label"] and any(evil in (e.text or "") for e in svg.iter())


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_a_browser_shows_it_on_a_phone_in_the_light_and_in_the_dark(runs, tmp_path):
    assert fastuda("compare", runs, "--out", tmp_path / "out", "--quiet").returncode == 0
    with Browser(tmp_path / "profile") as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True
        )
        browser.open((tmp_path / "out" / "comparison.html").as_uri())
        assert browser.run("[innerWidth, document.scrollingElement.scrollWidth]") == [360, 360]
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.call("Emulation.setEmulatedMedia", features=[feature])
            seen = browser.run(CONTRAST)
            assert (seen["page"] > 0.8) if scheme == "light" else (seen["page"] < 0.05)
            assert seen["count"] > 15 and seen["least"] >= 4.5
        assert browser.complaints() == []


def test_quiet_leaves_files_and_says_nothing(runs, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # nothing of it is needed
    done = fastuda("compare", runs, "--out", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = {"comparison.csv", "comparison.html", "comparison.md", "comparison.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    done = fastuda("compare", runs, "--quiet", "--json")
    assert len(json.loads(done.stdout)) == 2


def test_own_folders_are_told_apart(runs):
    for folder, data in (("plca_0", "a b"), ("plca_1", "other")):
        path = runs / folder / "config.yaml"
        text = path.read_text().replace("target: scenes", f"target: folder:/data/{data}")
        path.write_text(text)
    done = fastuda("compare", runs, "--json")
    said = {group["domains"] for group in json.loads(done.stdout)}
    pairs = {f"scenes -> {target} (val)" for target in ("scenes", "folder:a b", "folder:other")}
    assert said == pairs


def test_a_run_that_is_given_twice_counts_once(runs):
    one = json.loads(fastuda("compare", runs, "--json").stdout)
    assert json.loads(fastuda("compare", runs, runs / "plca_0", runs / "..", "--json").stdout) == one


@pytest.mark.parametrize(
    "change",
    [
        {"iou": None},
        {"iou": {"road": "much"}},
        {"mIoU19": "much"},
        {"mIoU19": [1]},
        {"step": None},
        {"iou": 3},
    ],
)
def test_a_damaged_result_is_named(change, runs):
    path = runs / "plca_0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for command in ("compare", "report"):
        done = fastuda(command, runs / "plca_0")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"error: {path.resolve()} is not a result of a run: ")


def test_a_result_without_a_score_or_that_is_a_folder_is_named(runs):
    path = runs / "plca_0" / "result.json"
    path.write_text('{"step": 4, "split": "val", "iou": {"road": 1}}')
    assert "is not a result of a run: KeyError('mIoU')" in fastuda("compare", runs).stderr
    path.unlink()
    path.mkdir()
    assert "is not a result of a run: IsADirectoryError" in fastuda("compare", runs).stderr


def test_a_configuration_that_names_no_method(runs):
    (runs / "plca_0" / "config.yaml").write_text("method: {}\n")
    done = fastuda("compare", runs)
    assert done.returncode == 2 and "config.yaml names no method: method.name is missing" in done.stderr


def test_a_folder_that_cannot_be_made(runs, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/x", "/proc/x"):
        done = fastuda("compare", runs, "--out", tmp_path / place)
        assert done.returncode == 2 and done.stderr.startswith("error: cannot write "), done.stderr
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_nothing_to_compare_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    done = fastuda("compare", tmp_path / "empty")
    assert done.returncode == 2 and "no finished run" in done.stderr
    done = fastuda("compare", tmp_path / "none")
    assert done.returncode == 2 and "no folder" in done.stderr
    (tmp_path / "empty" / "result.json").write_text("{}")
    done = fastuda("compare", tmp_path / "empty")
    assert done.returncode == 2 and "is not a result of a run" in done.stderr


def test_files_beside_the_runs_are_passed_over(runs, tmp_path):
    (runs / "notes.txt").write_text("mine")
    plain = fastuda("compare", runs, "--json")
    done = fastuda("compare", *sorted(runs.iterdir()), "--json")
    assert done.returncode == 0 and done.stdout == plain.stdout, done.stderr
    done = fastuda("compare", runs / "notes.txt")
    assert done.returncode == 2 and "no folder among" in done.stderr


def methods(table):
    """In the order of the table's rows."""
    return re.findall(r"^\| (\w+) \| \d", table, re.MULTILINE)


def test_a_grid_of_methods_and_seeds(scenes_root, tmp_path):
    out = tmp_path / "grid"
    args = [
        "--method",
        "source_only,plca",
        "--seeds",
        3,
        4,
        "--data-root",
        scenes_root,
        "--out",
        out,
        "--steps",
        2,
        "eval.every=1",
    ]
    done = fastuda("train", *args, "--quiet", *TINY)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        "source_only_3",
        "source_only_4",
        "plca_3",
        "plca_4",
    }
    assert "| source_only | 3, 4 |" in done.stdout and "| plca | 3, 4 |" in done.stdout
    page = (out / "comparison.html").read_text()
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles == ["mIoU19 of plca", *["image", *methods(done.stdout), "label"] * 3]
    assert page.count('<img src="data:image/jpeg') == 3 and page.count('<img src="data:image/png') == 9
    assert len(re.findall(r"<polyline", page)) == 2
    before = (out / "plca_3" / "metrics.csv").stat().st_mtime_ns
    again = fastuda("train", *args, "--quiet", *TINY)
    assert again.stdout == done.stdout and (out / "plca_3" / "metrics.csv").stat().st_mtime_ns == before
    # the methods of the grid stand beside each other: no run has a baseline of its own, whatever is set
    shown = fastuda("train", "--print-config", *args, "train.accumulate=2")
    assert shown.returncode == 0 and shown.stdout.count("baseline: 'off'") == 4, shown.stdout
    refused = fastuda("train", "--seeds", 1, 2)
    assert refused.returncode == 2 and "need --out" in refused.stderr
