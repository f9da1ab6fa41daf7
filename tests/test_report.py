"""The report of a run: one file, whole without a network, that a browser opens without complaint."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from fastuda import checkpoint
from fastuda.association import Cycles, chosen, covered_picture, drawing
from fastuda.charts import Curve, chart, nice_ticks, thin
from fastuda.data.labels import CITYSCAPES
from fastuda.report import write_report
from tests.program import TINY, fastuda

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_root):
    """PLCA with its source-only baseline and two evaluations."""
    out = tmp_path_factory.mktemp("reported") / "plca"
    args = ["--method", "plca", "--data-root", scenes_root, "--out", out, "--steps", 4, *TINY[:7]]
    done = fastuda("train", *args, "log.every=1", "eval.every=2", "log.tensorboard=false", "--quiet")
    assert done.returncode == 0 and "has no report" not in done.stderr, done.stderr
    return out


class Reader(HTMLParser):
    """Start tags with their attributes, headings, and whether every tag is closed in its turn."""

    VOID = ("meta", "img", "input", "br", "line", "circle", "polyline", "path", "image")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


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


COLLECT = """<script>
window.said = [];
addEventListener("error", e => said.push("error: " + (e.message || e.target.tagName)), true);
addEventListener("unhandledrejection", e => said.push("rejected: " + e.reason));
for (const kind of ["error", "warn"]) console[kind] = (...a) => said.push(kind + ": " + a.join(" "));
</script>"""

DRIVE = """<script>
addEventListener("load", () => {
  const of = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)];
  const slide = (r, v) => { r.value = v; r.dispatchEvent(new Event("input")); };
  const seen = {};
  seen.before = of("img.right").style.clipPath;
  slide(of("#viewer input"), 20);
  seen.after = of("img.right").style.clipPath;
  seen.image = of("img.left").src;
  all("[data-index]")[1].click();
  seen.other = of("img.left").src !== seen.image;
  all("[data-side=right][data-layer=label]")[0].click();
  seen.label = of("img.right").alt;
  seen.pressed = all("[data-side=right][aria-pressed=true]").map(b => b.textContent);
  const shown = () => all(".cycle:not([hidden])").length;
  slide(of("#cycle-count"), 1); seen.one = shown();
  slide(of("#cycle-count"), 60); seen.all = shown();
  of("#cycle-open").click(); seen.more = shown();
  seen.reached = all("button, input, summary").filter(e => e.tabIndex >= 0).length;
  document.documentElement.style.width = "360px";
  const flat = all("main *").filter(e => !e.closest("pre, .scroll"));
  seen.wide = Math.max(...flat.map(e => e.getBoundingClientRect().right));
  seen.drawn = all("img").every(i => i.naturalWidth > 0);
  seen.said = said; delete seen.image;
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_opens_it_without_complaint(run, tmp_path):
    text = (run / "report.html").read_text()
    driven = text.replace("<head>", "<head>" + COLLECT).replace("</body>", DRIVE + "</body>")
    (tmp_path / "driven.html").write_text(driven)
    found = browse(tmp_path, "driven.html")
    assert found["said"] == [] and found["drawn"] and found["wide"] <= 360
    assert (found["before"], found["after"]) == ("inset(0px 0px 0px 50%)", "inset(0px 0px 0px 20%)")
    assert found["other"] and found["label"].startswith("label of ") and found["pressed"] == ["label"]
    assert found["one"] == 1 < found["all"] <= found["more"]
    assert found["reached"] >= 2 + 12 + 3


def browse(folder, name):
    """What the driver saw in a page."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--window-size=500,900", "--virtual-time-budget=5000", "--dump-dom",
         (folder / name).as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search("SEEN(.*?)SEEN", done.stdout.rpartition("</script>")[2] or done.stdout, re.S)
    assert match, done.stderr
    return json.loads(match[1].replace("&amp;", "&"))


def test_writing_it_again_draws_no_random_number(run):
    before = (run / "report.html").read_text()
    torch.manual_seed(5)
    state = checkpoint.rng_state()
    write_report(run)
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b
               for a, b in zip(state.values(), checkpoint.rng_state().values(), strict=True))  # fmt: skip
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
    page = Reader((tmp_path / "run" / "report.html").read_text())
    assert "no held-out labels" in page.text and "left no pictures" in page.text and "Cycles" in page.text


def test_words_from_outside_stay_words(run, tmp_path):
    alone = tmp_path / "run"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("source_only", "checkpoints"))
    evil = "</script><script>alert(1)</script>{{pictures}}"
    result = json.loads((alone / "result.json").read_text())
    result["iou"] = {evil: 1.0, **result["iou"]}
    (alone / "result.json").write_text(json.dumps(result))
    (alone / "env.txt").write_text(evil)
    picture = next((alone / "preds").iterdir())
    picture.rename(picture.with_name("{{body}}<b>.png"))
    assert fastuda("report", alone).returncode == 0
    text = (alone / "report.html").read_text()
    assert "<script>alert" not in text and text.count("<script") == 2 and Reader(text).open == []


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
    found = Cycles(
        np.zeros((2, 2, 3), np.uint8), np.full((1, 3, 3), 100, np.uint8), (2, 2), (1, 3),
        labels=np.array([0, 0, 1, 255]), there=np.array([0, 0, 2, 1]), back=np.array([1, 2, 2, 3]),
    )  # fmt: skip
    assert found.closed.tolist() == [True, False, True, False]
    assert found.covered.tolist() == [0, 255, 1]
    assert sorted(chosen(found, 9, True)) == [0, 2] and chosen(found, 9, False) == [1]
    assert len(chosen(found, 1, True)) == 1
    shown = covered_picture(found, CITYSCAPES)
    assert shown[0, 1].tolist() == [35, 35, 35]
    assert shown[0, 0].tolist() == [round(35 * 0.3 + 0.7 * c) for c in CITYSCAPES.palette[0]]
    svg = drawing(found, CITYSCAPES, "data:a", "data:b")
    assert svg.count('class="cycle closed"') == 2 and svg.count('class="cycle open"') == 1
