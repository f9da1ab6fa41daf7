"""Renders the templates of the pages and of their drawings, and escapes every value."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Environment(
    loader=PackageLoader("fastuda.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: Any) -> Markup:
    """A file of ``templates/`` with its values. Another template inserts the result without escaping it."""
    return Markup(TEMPLATES.get_template(template).render(values))
