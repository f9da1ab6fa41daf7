"""The report of a run: one file, whole without a network, that a browser opens without complaint."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from fastuda.data.labels import CITYSCAPES
from fastuda.methods.cycles import Cycles
from fastuda.report.charts import Curve, chart, nice_ticks, thin
from fastuda.report.cycles import chosen, covered_picture, drawing
from fastuda.report.page import write_report
from fastuda.system.random import rng_state
from tests.browser import CONTRAST, PROGRAM, Browser, Reader
from tests.program import TINY, fastuda


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_root):
    """PLCA with its source-only baseline and two evaluations."""
    out = tmp_path_factory.mktemp("reported") / "plca"
    args = ["--method", "plca", "--data-root", scenes_root, "--out", out, "--steps", 4, *TINY[:7]]
    done = fastuda("train", *args, "log.every=1", "eval.every=2", "log.tensorboard=false", "--quiet")
    assert done.returncode == 0 and "has no report" not in done.stderr, done.stderr
    return out


def test_the_page_says_what_the_run_says(run):
    text = (run / "report.html").read_text()
    page = Reader(text)
    assert page.open == []
    result = json.loads((run / "result.json").read_text())
    base = json.loads((run / "source_only" / "result.json").read_text())
    for score in (result, base):
        assert f"{score['mIoU19']:.1f}" in page.text
    for name in CITYSCAPES.names:
        assert name in page.text
    for word in (
        "Curves",
        "feature association",
        "Class-centre",
        "Cycles",
        "Image pairs per second",
        "torch 2.",
        "Feature cycles that close in their class",
        "Learning rate",
    ):
        assert word in page.text, word
    assert "backbone: small" in page.text and "Peak memory" in page.text
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', text, re.S)[1])
    assert [set(p) for p in pictures] == [{"name", "image", "prediction", "source-only", "label"}] * 3


def test_it_is_one_file_without_a_network(run):
    text = (run / "report.html").read_text()
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    for tag, attributes in Reader(text).tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert (run / "report.html").stat().st_size < 2_000_000


def test_everything_that_moves_has_a_keyboard_and_a_name(run):
    text = (run / "report.html").read_text()
    page = Reader(text)
    ranges = [a for tag, a in page.tags if tag == "input"]
    assert len(ranges) == 2 and all(a["type"] == "range" for a in ranges)
    assert len(re.findall(r"<label>[A-Z][a-z]+ <input", text)) == 2
    buttons = [a for tag, a in page.tags if tag == "button"]
    assert len(buttons) == 8 + 3 + 1 and all("aria-pressed" in a for a in buttons)
    assert not any("onclick" in a for _, a in page.tags)
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert all("alt" in a for tag, a in page.tags if tag == "img")


FOCUSED = """[...document.querySelectorAll("*")].indexOf(document.activeElement)"""
FOCUSABLE = """[...document.querySelectorAll("button, input, summary, [tabindex]")]
  .filter(e => e.checkVisibility()).map(e => [...document.querySelectorAll("*")].indexOf(e))"""


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The report in a browser, on a phone."""
    if PROGRAM is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no Chromium here")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True
        )
        browser.open((run / "report.html").as_uri())
        yield browser


def test_a_browser_opens_it_without_complaint_on_a_phone(page):
    assert page.run("[innerWidth, document.scrollingElement.scrollWidth]") == [360, 360]
    assert page.run("[...document.images].length > 3 && [...document.images].every(i => i.naturalWidth > 0)")
    assert float(page.run("parseFloat(getComputedStyle(document.body).fontSize)")) >= 16
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.run("document.scrollingElement.scrollWidth") == 360
    page.run("document.querySelectorAll('details').forEach(d => d.open = false)")
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_the_light_and_in_the_dark(page, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.call("Emulation.setEmulatedMedia", features=[feature])
    seen = page.run(CONTRAST)
    assert (seen["page"] > 0.8) if scheme == "light" else (seen["page"] < 0.05)
    assert seen["count"] > 100 and seen["least"] >= 4.5  # what WCAG asks of text


def test_every_control_is_reached_and_moved_by_keys_alone(page):
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    wanted, seen = page.run(FOCUSABLE), []
    assert len(wanted) >= 2 + 12 + 1 + 4
    clip, shown = "document.querySelector('img.right').style.clipPath", ".cycle:not([hidden])"
    for _ in wanted:
        page.press("Tab")
        seen.append(page.run(FOCUSED))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        control = page.run("(e => [e.tagName, e.id, e.textContent])(document.activeElement)")
        if control[0] == "INPUT" and control[1] == "":
            before = page.run(clip)
            page.press("ArrowLeft")
            assert (before, page.run(clip)) == ("inset(0px 0px 0px 50%)", "inset(0px 0px 0px 49%)")
        elif control[0] == "INPUT":
            counts = []
            for key in ("Home", "End"):
                page.press(key)
                counts.append(page.run(f"document.querySelectorAll('{shown}').length"))
            assert counts[0] == 1 < counts[1]
        elif control[0] == "BUTTON":
            page.press("Enter")
            assert page.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert seen == wanted
    # the last buttons of each kind were pressed last: right of the divider lies the label of the last picture
    assert page.run("document.querySelector('img.right').alt").startswith("label of ")
    count = page.run("document.querySelectorAll('[data-index]').length")
    assert f"({count} of {count})" in page.run("document.querySelector('.name').textContent")
    assert page.complaints() == []


def test_writing_it_again_draws_no_random_number(run):
    before = (run / "report.html").read_text()
    torch.manual_seed(5)
    state = rng_state()
    write_report(run)
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b
               for a, b in zip(state.values(), rng_state().values(), strict=True))  # fmt: skip
    assert (run / "report.html").read_text() == before


def test_without_data_the_rest_is_there(run, tmp_path):
    alone = tmp_path / "run"
    left_out = shutil.ignore_patterns("source_only", "preds", "report.html", "checkpoints")
    shutil.copytree(run, alone, ignore=left_out)
    config = (alone / "config.yaml").read_text().replace("source: scenes", "source: gta5:/no/such/folder")
    (alone / "config.yaml").write_text(config)
    done = fastuda("report", alone)
    assert done.returncode == 0 and done.stdout.strip() == str(alone / "report.html"), done.stderr
    page = Reader((alone / "report.html").read_text())
    assert "Not measured: no folder /no/such/folder" in page.text and "left no pictures" in page.text
    assert "source-only" not in page.text and "mIoU19" in page.text


def test_a_run_without_held_out_labels(scenes_root, tmp_path):
    args = ["--method", "plca", "--data-root", scenes_root, "--out", tmp_path / "run", "--steps", 1, *TINY]
    done = fastuda("train", *args, "log.report=true", "data.eval_split=none", "--quiet")
    assert done.returncode == 0 and "has no report" not in done.stderr, done.stderr
    assert done.stdout.startswith("no scores: the target has no held-out labels\n")
    text = (tmp_path / "run" / "report.html").read_text()
    page = Reader(text)
    assert "no held-out labels" in page.text and "Cycles" in page.text
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', text, re.S)[1])
    assert pictures and all(set(p) == {"name", "image", "prediction"} for p in pictures)
    assert len(list((tmp_path / "run" / "preds").glob("*.png"))) == len(pictures)


def test_words_from_outside_stay_words(run, tmp_path):
    alone = tmp_path / "run"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("source_only", "checkpoints"))
    evil = "</script><script>alert(1)</script>{{pictures}}\"'&amp;"
    result = json.loads((alone / "result.json").read_text())
    result["iou"] = {evil: 1.0, **result["iou"]}
    (alone / "result.json").write_text(json.dumps(result))
    (alone / "env.txt").write_text(evil)
    picture = next((alone / "preds").iterdir())
    picture.rename(picture.with_name("{{body}}<b>\"' onload=x.png"))
    with (alone / "metrics.csv").open("a") as curves:
        curves.write('1,"train/<b onload=""x"">",1\n')
    assert fastuda("report", alone).returncode == 0
    text = (alone / "report.html").read_text()
    page = Reader(text)
    assert "<script>alert" not in text and text.count("<script") == 2 and page.open == []
    assert evil in page.text and '<b onload="x">' in page.text
    assert not any("onload" in attributes for _, attributes in page.tags)
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert "Show {{body}}<b>\"' onload=x" in labels
    pictures = json.loads(re.search(r'id="pictures">(.*?)</script>', text, re.S)[1])
    assert "{{body}}<b>\"' onload=x" in [picture["name"] for picture in pictures]


def test_a_device_that_there_is_not_leaves_the_page_alone(run):
    before = (run / "report.html").read_bytes()
    done = fastuda("report", run, "--device", "tpu")
    assert done.returncode == 2 and "unknown device 'tpu'" in done.stderr
    assert (run / "report.html").read_bytes() == before


def test_a_run_that_has_not_ended_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 3}")
    done = fastuda("report", tmp_path)
    assert done.returncode == 2 and "holds no finished run" in done.stderr
    (tmp_path / "result.json").write_text("[]")
    done = fastuda("report", tmp_path)
    assert done.returncode == 2 and "is not a result of a run" in done.stderr


def test_ticks_enclose_and_curves_thin_to_means():
    for low, high in ((0, 1), (-3.2, 17.1), (5, 5), (0, 0), (1e-5, 3e-5), (15.3, 18.9)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7, (low, high, ticks)
        assert ticks[0] < ticks[-1]
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thin(points)
    assert len(few) <= 300 and few[0] == (3.0, 0.5) and few[-1][0] == 999.0
    assert chart("nothing", [Curve("a", [(0, float("nan"))])]) == ""
    assert "<circle" in chart("one", [Curve("a", [(4, 2.0)])])


def test_cycles_by_hand():
    """Four source pixels of two classes, three target pixels."""
    source, target = np.zeros((2, 2, 3), np.uint8), np.full((1, 3, 3), 100, np.uint8)
    found = Cycles(
        (2, 2), (1, 3),
        labels=np.array([0, 0, 1, 255]), there=np.array([0, 0, 2, 1]), back=np.array([1, 2, 2, 3]),
    )  # fmt: skip
    assert found.closed.tolist() == [True, False, True, False]
    assert found.covered.tolist() == [0, 255, 1]
    assert sorted(chosen(found, 9, True)) == [0, 2] and chosen(found, 9, False) == [1]
    assert len(chosen(found, 1, True)) == 1
    shown = covered_picture(found, target, CITYSCAPES)
    assert shown[0, 1].tolist() == [35, 35, 35]
    assert shown[0, 0].tolist() == [round(35 * 0.3 + 0.7 * c) for c in CITYSCAPES.palette[0]]
    svg = drawing(found, CITYSCAPES, source, target)
    assert svg.count('class="cycle closed"') == 2 and svg.count('class="cycle open"') == 1
