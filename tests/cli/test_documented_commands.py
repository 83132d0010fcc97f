"""Commands that README, the docs and recipes show are commands that there are, with options that they have."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from pipo.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *(path for path in sorted(ROOT.glob("recipes/*")) if path.is_file()),
]
START = re.compile(r"^[#\s]*(?:\[.*?\|\| )?(?:torchrun .*-m |accelerate launch .*-m |\$)?pipo (?=[a-z$])")


def shown_commands(page):
    """`pipo …` lines of code, without comments, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    for line in text.replace("\\\n", " ").splitlines():
        if match := START.match(line):
            code = re.split(r"\s#|\s&$|\s[|>]", line[match.end() :])[0].replace("…", "")
            yield shlex.split(code)


SHOWN = [(page.name, words) for page in PAGES for words in shown_commands(page)]


def command_of(words):
    """The command and what is left of the words."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command, rest


def test_the_pages_are_read():
    assert len(SHOWN) > 30
    assert {"README.md", "training.md", "tiny.sh", "qwen3.5-4b-opd.yaml"} <= {name for name, _ in SHOWN}


@pytest.mark.parametrize(
    ("name", "words"), SHOWN, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value
)
def test_a_shown_command_has_these_options(name, words):
    """Breaks when an option is renamed and a page still shows the old one."""
    command, rest = command_of(words)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    asked = {word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)}
    assert asked <= options | {"--help", "-h"}
