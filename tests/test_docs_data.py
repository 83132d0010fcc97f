"""What docs/data.md shows works as written."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipo.cli.main import app
from pipo.data.records import OpdRow, SftRow, read_rows

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [re.sub(r"\\\n", " ", block).splitlines() for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)]


def test_the_small_way_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    for command in BLOCKS[0]:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    assert len(read_rows("sft.jsonl", SftRow).rows()) > 40
    assert len(read_rows("opd.jsonl", OpdRow).rows()) > 1


@pytest.mark.parametrize("command", [command for block in BLOCKS for command in block])
def test_every_command_and_option_exists(command):
    words = shlex.split(command)
    nested = 3 if words[1] == "data" else 2
    shown = CliRunner().invoke(app, [*words[1:nested], "--help"], env={"COLUMNS": "200"}).output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown, option
