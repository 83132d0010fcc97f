"""What README shows works as written."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipo.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    for line in block.splitlines()
    if line.startswith("pipo ")
]


def test_the_python_example(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"Play .*\(\d+ tokens in \d+ steps\)", line) for line in lines), lines


def test_the_commands_are_found():
    assert {command.split()[1] for command in COMMANDS} == {
        *("generate", "chat", "info", "init", "export", "serve"),
        *("data", "sft", "merge", "opd", "gate", "eval", "tune-threshold", "report", "bench", "plan"),
    }


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if "src/pipo" in command], ids=lambda c: c.split()[1]
)
def test_the_commands_on_the_demos_model(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    command = command.replace("--out runs", f"--out {tmp_path}")
    said = "Ann is on 37. Cards: +5 -8 +12 x3 +4.\n/quit\n"
    result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:], input=said)
    assert result.exit_code == 0, result.output
    if "--json" in command:
        assert json.loads(result.stdout)[0]["text"].startswith("Play ")
    elif "chat" in command:
        assert result.stdout.startswith("Play ")
    elif "eval" in command:
        assert "avg@4" in result.stdout
        assert list(tmp_path.rglob("report.html"))
    else:
        assert "sound" in result.stdout


@pytest.mark.parametrize("command", ["demo", "test"])
def test_the_make_targets_exist(command):
    assert f"make {command} " in README
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
