"""What every page of this project's reports is made with: one style, and templates that escape all that they are given."""

from __future__ import annotations

from importlib import resources

import jinja2
from markupsafe import Markup


def read_asset(package: str, name: str) -> str:
    """A file that lies in a package's folder, as text."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def render_page(template: str, **content: object) -> str:
    """The page that a Jinja template makes of `content`. `style` there is the style that pages share."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(style=Markup(read_asset("pipo.pages", "style.css")), **content)
