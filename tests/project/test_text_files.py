"""Text files are read and written in UTF-8, whatever the locale says."""

import ast
from pathlib import Path

import numpy as np
import pytest

from fastuda.data.domains.open import open_domain
from fastuda.data.loading.pairs import read_pairs
from fastuda.data.loading.weak_labels import read_weak_labels
from tests.data.data_files import picture, save
from tests.program import ROOT, TINY, in_a_process

SOURCES = sorted([*(ROOT / "fastuda").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def text_without_encoding(code: str) -> list[str]:
    """The calls that open text by the locale's encoding."""
    bad = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("open", "fdopen") and owner not in ("os", "Image", "rasterio", "tarfile", "zipfile"):
            first = 0 if owner and name == "open" else 1
            mode = given.get("mode") or (node.args[first] if len(node.args) > first else None)
            binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        elif name in ("read_text", "write_text"):
            binary = False
        else:
            continue
        if not binary and "encoding" not in given:
            bad.append(f"line {node.lineno}: {ast.unparse(node)[:70]}")
    return bad


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("open(p)", 1),
        ("open(p, 'a')", 1),
        ("p.open('w', newline='')", 1),
        ("p.read_text(); p.write_text('x')", 2),
        ("open(p, 'rb'); p.open('wb'); p.open(encoding='utf-8'); Image.open(p)", 0),
    ],
)
def test_the_search_finds_what_it_looks_for(code, count):
    assert len(text_without_encoding(code)) == count


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_file_is_opened_with_an_encoding(path):
    assert not text_without_encoding(path.read_text(encoding="utf-8"))


def own(root: Path, names: str = "[Straße, Bäume]") -> Path:
    rng = np.random.default_rng(0)
    for i in range(4):
        save(picture(rng, 32, 64), root / "images" / f"Töne {i}.png")
        save(rng.integers(0, 2, (32, 64), dtype=np.uint8), root / "labels" / f"Töne {i}.png")
    (root / "classes.yaml").write_text(f"names: {names}\n", encoding="utf-8")
    return root


@pytest.mark.slow
def test_a_run_under_an_ascii_locale(tmp_path):
    root, target, out = own(tmp_path / "own"), own(tmp_path / "target"), tmp_path / "run"
    command = ("--method", "source_only", "--source", f"folder:{root}", "--target", f"folder:{target}")
    small = ("--backbone", "small", "--steps", 2, "--device", "cpu", "--out", out)
    done = in_a_process("train", *command, *small, *TINY, "log.report=true", env=ASCII)
    assert done.returncode == 0, done.stderr
    assert r"Stra\xdfe" in done.stdout
    assert "Straße" in (out / "table.txt").read_text(encoding="utf-8")
    scored = in_a_process("evaluate", out, "--csv", out / "iou.csv", env=ASCII)
    assert scored.returncode == 0, scored.stderr
    assert "Straße" in (out / "iou.csv").read_text(encoding="utf-8")
    checked = in_a_process("data", "check", f"folder:{root}", "--no-sheet", env=ASCII)
    assert checked.returncode == 0, checked.stderr


def test_a_byte_order_mark_is_not_text(tmp_path):
    root = own(tmp_path / "own")
    for name, text in (
        ("train.txt", "Töne 1.png\n"),
        ("splits.json", '{"some": ["Töne 2.png"]}'),
        ("classes.yaml", "names: [a, b]\n"),
    ):
        (root / name).write_text(text, encoding="utf-8-sig")
    for split, stem in (("train", "Töne 1"), ("some", "Töne 2")):
        domain = open_domain(f"folder:{root}:{split}", role="source", data_root=".")
        assert [item.image.stem for item in domain.items] == [stem]
    (tmp_path / "weak.csv").write_text("image,class\nTöne 1.png,a\n", encoding="utf-8-sig")
    (tmp_path / "weak.json").write_text('{"images": {"Töne 1.png": {"tags": ["a"]}}}', encoding="utf-8-sig")
    domain = open_domain(f"folder:{root}:train", role="target", data_root=".")
    for name in ("weak.csv", "weak.json"):
        assert read_weak_labels(tmp_path / name, domain).tags.tolist() == [[True, False]]
    (tmp_path / "pairs.csv").write_text("images/Töne 1,images/Töne 3\n", encoding="utf-8-sig")
    assert read_pairs(tmp_path / "pairs.csv", domain)[0].stem == "Töne 3"
