"""The documentation: it builds, its links lead somewhere, its code runs, its quotes are in the source."""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bench.registry import CASES
from fastuda import ops
from fastuda.__main__ import module as command_module
from fastuda.config.resolve import shipped
from fastuda.methods import METHODS
from fastuda.system.settings import plain
from tests.browser import PROGRAM, Browser
from tests.program import ROOT, environment, fastuda

DOCS = ROOT / "docs"
PAGES = sorted(set(DOCS.rglob("*.md")) - {DOCS / "assets" / "README.md"})
NAMES = [page.relative_to(DOCS).as_posix() for page in PAGES]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    """Of the headings, as MkDocs makes them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site's folder."""
    site = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def test_it_builds_without_a_warning_and_needs_no_network(built):
    pages = sorted(built.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(
            r"<!-- (measured|settings|implementations|section|reference|published|summaries) ", text
        ), page
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"([^\"]+)\"", text)
        assert loaded and not [url for url in loaded if url.startswith(("http", "//"))], page


def test_the_reference_has_every_op(built):
    text = (built / "reference" / "ops.html").read_text(encoding="utf-8")
    for name in ops.__all__:
        assert re.search(rf'id="[\w.]*\.{name}"', text), name
    pages = [page.read_text(encoding="utf-8") for page in (built / "reference").glob("*.html")]
    assert len(pages) == 5 and not [role for page in pages for role in re.findall(r":\w+:<code>", page)]


@pytest.fixture(scope="module")
def browser(built, tmp_path_factory):
    if PROGRAM is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no Chromium here")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.call("Network.enable")
        # the theme stores the scheme of a page, also late, and the next page would take it
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="localStorage.clear()")
        yield browser


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_pages_fit_the_screen_and_ask_nothing_of_the_network(browser, built, name, width, scheme):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.call("Emulation.setDeviceMetricsOverride", **screen)
    preferred = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=preferred)
    browser.events.clear()
    browser.open((built / name).with_suffix(".html").as_uri())
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    drawn = "e => e.querySelector('.katex') && !e.querySelector('.katex-error')"
    assert browser.run(f"[...document.querySelectorAll('.arithmatex')].every({drawn})")
    shown = browser.run("document.body.dataset.mdColorScheme")
    assert shown == {"light": "default", "dark": "slate"}[scheme]
    assert not browser.complaints()
    requests = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in requests]
    assert asked and all(url.startswith(("data:", "blob:", built.as_uri())) for url in asked), asked


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize("name", [n for n, p in zip(NAMES, PAGES, strict=True) if blocks(p, "python")])
def test_python_blocks_run(name, capsys):
    namespace: dict = {"__name__": "docs"}
    for code in blocks(DOCS / name, "python"):
        exec(compile(code, name, "exec"), namespace)


class Parsed(Exception):
    """Raised in the place of what a command would do."""


def commands(page: Path) -> list[list[str]]:
    """The lines of ``bash`` blocks and of indented ones that run fastuda, as words."""
    found = []
    indented = "\n".join(re.findall(r"^    (?! )((?:.*\\\n)*.*)", page.read_text(), re.MULTILINE))
    for block in [*blocks(page, "bash"), indented]:
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(python|torchrun) .*-m fastuda\.", line):
                found.append(shlex.split(line, comments=True))
    return found


WITH_COMMANDS = [page for page in (*PAGES, ROOT / "README.md") if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_understood(page, monkeypatch):
    def only_parse(method):
        def parse(self, *args, **kwargs):
            raise Parsed(method(self, *args, **kwargs))

        return parse

    for words in commands(page):
        at = next(i for i, word in enumerate(words) if word.startswith("fastuda."))
        assert words[at - 1] == "-m"
        module = words[at].removeprefix("fastuda.")
        rest = words[at + 1 :][: words[at + 1 :].index(">") if ">" in words[at + 1 :] else None]
        if module == "train" and not any(word.endswith(".yaml") for word in rest):
            done = fastuda("train", *rest, "--print-config")
            assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
            continue
        program = importlib.import_module(command_module(module))
        with monkeypatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
            for kind in ("parse_args", "parse_intermixed_args"):
                patch.setattr(
                    argparse.ArgumentParser, kind, only_parse(getattr(argparse.ArgumentParser, kind))
                )
            patch.setattr(sys, "argv", words[at:][: len(rest) + 1])
            try:
                program.main()
            except Parsed:
                continue
            except SystemExit:
                pytest.fail(f"{' '.join(words)}: {said.getvalue()}")


def followed(script: str) -> Iterator[subprocess.CompletedProcess]:
    """Run a page's lines in their order: those of fastuda in this process, which spares each an import of
    torch, the rest in bash."""
    shell: list[str] = []
    for line in [*script.replace("\\\n", " ").splitlines(), ""]:
        words = shlex.split(line, comments=True) if line.startswith("python -m fastuda.") else []
        if not words and line:
            shell.append(line)
            continue
        if shell:
            yield subprocess.run(["bash", "-euc", "\n".join(shell)], capture_output=True, text=True)
            shell = []
        if words:
            words, into = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
            module = words[2].removeprefix("fastuda.")
            done = fastuda(module, *words[3:])
            if into:
                Path(into).write_text(done.stdout)
            yield done


@pytest.mark.slow
def test_your_own_data_in_ten_minutes_is_followed_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    out = err = ""
    for done in followed("\n".join(blocks(DOCS / "ten-minutes.md", "bash"))):
        assert done.returncode == 0, f"{done.args}: {done.stderr[-3000:]}"
        out, err = out + done.stdout, err + done.stderr
    assert "same by name: sidewalk = pavement" in err and "mIoU7" in out
    assert len(list((tmp_path / "predictions" / "overlay").rglob("*.png"))) == 6
    assert (tmp_path / "photos.png").is_file() and "steps: 20000" in (tmp_path / "real.yaml").read_text()
    assert (tmp_path / "mine" / "photos" / "classes.yaml").is_file() and not (
        tmp_path / "drawn/gta5"
    ).exists()


def templates() -> list[str]:
    """Every message of an exception in the package, with a bar where a value stands."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return "|"

    found = []
    for path in (ROOT / "fastuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ("UserError", "BadFile", "ValueError", "TypeError")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                found.append(" ".join(map(text, node.args)))
    return found


def quoted_messages() -> list[str]:
    return re.findall(r"^\| `(.*?)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)


def test_quoted_messages_are_in_the_source():
    known = templates()
    assert quoted_messages()
    for message in quoted_messages():
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" ;,.:()'")]
        # what nearest() adds is in errors.py
        parts = [part for part in parts if "did" not in part]
        assert parts, message
        expression = re.compile(".*".join(parts), re.DOTALL)
        assert any(expression.search(text) for text in known), message


def read_variables() -> set[str]:
    """FASTUDA_ variables that the project's Python reads from its environment."""
    found = set()
    for folder in ("fastuda", "kernels", "csrc", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"environ(?:\.get\(|\[)\s*\"(FASTUDA_\w+)\"", path.read_text()))
    return found | set(re.findall(r"environ\.get\(\"(FASTUDA_\w+)\"", (ROOT / "setup.py").read_text()))


def test_environment_variables_are_those_that_are_read():
    said = set(re.findall(r"`(FASTUDA_\w+)`", (DOCS / "environment.md").read_text()))
    assert said == read_variables()


def test_every_op_and_method_has_its_page():
    text = {page.stem: page.read_text() for page in PAGES}
    for path in (ROOT / "fastuda" / "ops").glob("[a-z]*.py"):
        if not path.stem.startswith("reference"):
            assert f"# {path.stem}" in text[path.stem]
            assert f"<!-- implementations {path.stem} -->" in text[path.stem]
    whole = "\n".join(text.values())
    for name in ops.__all__:
        if name.islower() and name not in ("backends", "release_memory"):
            assert f"<!-- measured {name} -->" in whole, name
    for name in METHODS:
        assert name == "source_only" or f"<!-- settings {name} -->" in text[name], name
    for name in re.findall(r"--config ([a-z0-9_]+)[ `\n]", whole):
        assert name in shipped()


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_those_of_the_dataclass(tables, method):
    config = METHODS[method].Config
    shown = tables.settings(method)
    rows = dict(re.findall(r"^\| `method\.(\w+)` \| `(.*?)` \|", shown, re.MULTILINE))
    assert rows.keys() == inspect.get_annotations(config).keys()
    assert not re.findall(r"^\| `.*\|  \|$", shown, re.MULTILINE), "a setting without a word on it"
    for field in dataclasses.fields(config):
        if field.name in rows:
            value = yaml.safe_load(rows[field.name])
            value = float(value) if isinstance(field.default, float) else value
            assert value == plain(field.default) and type(value) is type(plain(field.default)), field.name
        else:
            parents = [name for name, cls in METHODS.items() if cls.Config in config.__mro__[1:]]
            assert any(f"({name}.md)" in shown for name in parents)


def test_tables_hold_what_was_measured_and_say_what_was_not(tables, monkeypatch):
    case = next(c for c in CASES if c.op == "lovasz_softmax")
    row = dict.fromkeys(("p20", "p80", "note", "commit", "to_reference"), "")
    row |= {"op": case.op, "provider": "fastuda", "mode": case.mode, "dtype": case.dtype, "shape": case.shape}
    row |= {"p50": "12.345", "extra_mib": "1.5", "to_floor": "7.7", "error": "1e-7", "machine": "M"}
    row |= {"device": "cuda", "torch": "2.13", "date": "2026-01-02"}
    monkeypatch.setattr("bench.table.load", lambda: [row])
    text = tables.measured("lovasz_softmax")
    assert "CPU: not measured." in text and "GPU: M, torch 2.13, 2026-01-02." in text
    assert f"| {case.shape} | 12.3 | not measured | 7.7 | 1.5 | 1e-7 |" in text
    assert tables.measured("affinity_cleaning_loss").startswith("Not measured")
    assert "`csrc/cpu/lovasz_softmax.cpp`" in tables.implementations("lovasz_softmax")
    shown = tables.implementations("cycle_match")
    assert re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", shown, re.MULTILINE) == [
        (status.name, status.why) for status in ops.backends("cycle_match")
    ]
    assert "`kernels/cycle_match.py`" in shown
    assert tables.implementations("no such op") == "Torch's own operations, on every device."
    page = tables.on_page_markdown("a\n\n<!-- measured lovasz_softmax -->\n\nb")
    assert page == f"a\n\n{text}\n\nb"
