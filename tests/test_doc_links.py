"""What docs and README point at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(r"`([\w/]+\.(?:py|md|toml|txt))`", text))
    lost = [
        path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "src" / "pipo", page.parent))
    ]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    lost += [link for link in links if not (page.parent / link).exists()]
    assert lost == []


def test_the_tree_in_the_architecture_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("```\nsrc/pipo/\n")[1].split("```")[0]
    named = {line.split()[0].rstrip("/") for line in block.splitlines()}
    there = {
        path.name
        for path in (ROOT / "src" / "pipo").iterdir()
        if path.name not in {"__pycache__", "__main__.py", "py.typed"}
    }
    assert named == there
