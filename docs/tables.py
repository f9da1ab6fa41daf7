"""Tables of the documentation, made while it is built: a MkDocs hook.

In a page ``<!-- measured OP -->`` becomes what ``bench/results`` holds about an op,
``<!-- settings METHOD -->`` the settings of a method with their defaults, and ``<!-- section NAME -->`` those
of a section of a configuration, so that none is ever typed. ``<!-- implementations OP -->`` lists an
op's backends in their order, ``<!-- published weights -->`` lists the weight files that have a name,
``<!-- reference PACKAGE -->`` becomes the docstrings of all that a package exports, and
``<!-- summaries FOLDER -->`` the first paragraphs of a folder's pages. The pages of ops join the navigation
by themselves.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

NONE = "not measured"
ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>(?:~[\w.]*\.)?([\w.]+)</code>")
MARK = re.compile(
    r"<!-- (measured|implementations|settings|section|reference|published|summaries) ([\w.]+) -->"
)


def measured(op: str) -> str:
    """Times of every provider at every size of the bench, per machine; what has no number says so."""
    from bench.registry import CASES, SWEEP
    from bench.table import load

    cases = [case for case in (*CASES, *SWEEP) if case.op == op]
    if not cases:
        return f"{NONE.capitalize()}: the bench has no case of `{op}`."
    rows = [row for row in load() if row["op"] == op]
    parts = []
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        machines = sorted({row["machine"] for row in rows if row["device"] == device})
        if not machines:
            parts.append(f"{title}: {NONE}.")
        for machine in machines:
            chosen = [row for row in rows if (row["device"], row["machine"]) == (device, machine)]
            last = max(chosen, key=lambda row: row["date"])
            parts.append(f"{title}: {machine}, torch {last['torch']}, {last['date']}.")
            parts.append(_measured_table(cases, chosen))
    return "\n\n".join(parts)


def _measured_table(cases: list[Any], rows: list[dict[str, str]]) -> str:
    others = sorted({row["provider"] for row in rows} - {"fastuda", "reference"})
    providers = ["fastuda", "reference", *others]
    head = ["pass", "dtype", "size", *(f"{name}, ms" for name in providers), "of floor", "extra MiB", "error"]
    lines = [head, ["---"] * len(head)]
    for case in dict.fromkeys((c.mode, c.dtype, c.shape) for c in cases):
        found = {row["provider"]: row for row in rows if (row["mode"], row["dtype"], row["shape"]) == case}
        own = found.get("fastuda", {})
        times = [_time(found.get(name, {})) for name in providers]
        rest = [own.get(key) or NONE for key in ("to_floor", "extra_mib", "error")]
        lines.append([*case, *times, *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(row: dict[str, str]) -> str:
    if row.get("p50"):
        return f"{float(row['p50']):.3g}" if float(row["p50"]) < 100 else f"{float(row['p50']):.0f}"
    return f"{NONE}: {row['note']}" if row.get("note") else NONE


def implementations(op: str) -> str:
    """The rows of an op's backend table, in the order in which they are tried; without kernels it is torch's
    own operations."""
    from fastuda.ops._backends import BACKENDS

    rows = BACKENDS.get(op, ())[:-1]
    if not rows:
        return "Torch's own operations, on every device."
    folders = {"cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu"}
    lines = [["backend", "device", "source", "why in this order"], ["---"] * 4]
    for row in rows:
        path = folders.get(row.name, "kernels/{}.py").format(op)
        lines.append([f"`{row.name}`", row.device, f"`{path}`" if (ROOT / path).is_file() else "", row.why])
    last = BACKENDS[op][-1]
    lines.append([f"`{last.name}`", last.device, f"`fastuda/ops/{op}.py`", last.why])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings(method: str) -> str:
    """Key, default and meaning of every setting of a method, from its dataclass."""
    from fastuda.methods import METHODS

    config = METHODS[method].Config
    parents = [name for name, cls in METHODS.items() if cls.Config in config.__mro__[1:]]
    return _fields(config, "method") + "".join(f"\n\nAnd all of [`{name}`]({name}.md)." for name in parents)


def section(name: str) -> str:
    """Key, default and meaning of every setting of a section of a configuration."""
    from fastuda.config.schema import RunConfig

    sections = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    return _fields(sections[name], name)


def _fields(config: Any, prefix: str) -> str:
    """The table of a dataclass's own fields."""
    own = inspect.get_annotations(config)
    texts = _field_docs(config)
    lines = [["key", "default", ""], ["---"] * 3]
    for field in dataclasses.fields(config):
        if field.name in own:
            text = texts.get(field.name, "")
            lines.append([f"`{prefix}.{field.name}`", f"`{_shown(field)}`", text.replace("|", "\\|")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reference(package: str) -> str:
    """Directives of mkdocstrings for all that a package exports, functions before what they return."""
    module = importlib.import_module(package)
    exported = sorted((getattr(module, name) for name in module.__all__), key=inspect.isclass)
    return "\n\n".join(f"::: {item.__module__}.{item.__qualname__}" for item in exported)


def published(name: str) -> str:
    """The weight files that ``--weights`` knows by name."""
    from fastuda.models.published import DINOV2, IMAGENET

    lines = [["`--weights`", "`--backbone`", "public name", "file", "MiB", "licence of the weights"]]
    lines.append(["---"] * 6)
    files = [("imagenet", f"`{backbone}`", file) for backbone, file in IMAGENET.items()]
    files += [(key, "DINOv2", file) for key, file in DINOV2.items()]
    for key, backbone, file in files:
        size = "not published" if file.megabytes is None else f"{file.megabytes:.1f}"
        link = f"[{file.name}]({file.url})"
        lines.append([f"`{key}`", backbone, file.public_name, link, size, file.licence])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pages(folder: str) -> list[Path]:
    """The pages of a folder of docs but for its index."""
    return [path for path in sorted((ROOT / "docs" / folder).glob("*.md")) if path.stem != "index"]


def summaries(folder: str) -> str:
    """A row for each page: what its title names, its first paragraph."""
    lines = [["op", "what it computes"], ["---"] * 2]
    for page in pages(folder):
        title, text = page.read_text(encoding="utf-8").removeprefix("# ").split("\n\n")[:2]
        lines.append([f"[`{title.replace(', ', '`, `')}`]({page.name})", " ".join(text.split())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MAKERS = (measured, implementations, settings, section, reference, published, summaries)


def _shown(field: Any) -> str:
    """The default as it is written in a configuration."""
    from fastuda.system.settings import plain

    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    text = yaml.safe_dump(plain(default), default_flow_style=True, width=1000)
    return text.strip().removesuffix("...").strip()


def _field_docs(config: type) -> dict[str, str]:
    """Field to the string that follows it in the class's body, on one line, literals as Markdown has them."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split()).replace("``", "`")
    return found


def on_config(config: Any) -> None:
    """MkDocs calls this first: the pages of ops join their index in the navigation."""
    (ops,) = (section["Ops"] for section in config["nav"] if "Ops" in section)
    ops += [page.relative_to(ROOT / "docs").as_posix() for page in pages("ops")]


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """MkDocs calls this with the text of every page."""
    makers = {maker.__name__: maker for maker in MAKERS}
    return MARK.sub(lambda mark: makers[mark[1]](mark[2]), markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """MkDocs calls this with the page as HTML: Sphinx's roles in docstrings become the bare name, and a
    number stays on one line with its deviation."""
    return ROLE.sub(r"<code>\1</code>", html).replace(" ± ", "\u00a0±\u00a0")
