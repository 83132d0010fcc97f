"""Exit statuses, and where output goes."""

import json
import signal
import subprocess
import sys
from functools import partial

import pytest

from pipo.cli.terminal import print_json
from pipo.errors import RequestError

COMMANDS = [
    "demo",
    "generate",
    "chat",
    "serve",
    "info",
    "init",
    "export",
    "merge",
    "fetch",
    "data",
    "sft",
    "opd",
    "bench",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command in result.output


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, "pipo 0.1.0\n")


def test_python_m_pipo_is_pipo():
    result = subprocess.run([sys.executable, "-m", "pipo", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == "pipo 0.1.0\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "somewhere"],
        ["generate", "somewhere", "--prompt", "x", "--top-p", "7"],
        ["generate", "somewhere", "--prompt", "x", "--logit-bias", "five"],
        ["generate", "somewhere", "--prompts-file", "/no/such/file"],
        ["demo", "--resume"],
    ],
)
def test_a_users_error_is_one_line_and_exit_2(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("pipo: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [{"args": ["--debug"]}, {"env": {"PIPO_DEBUG": "1"}}], ids=["option", "environment"])
def test_debug_shows_the_error_itself(run, how):
    result = run(*how.get("args", []), "generate", "somewhere", env=how.get("env"))
    assert isinstance(result.exception, RequestError)


def test_usage_errors_exit_2(run):
    assert run("generate").exit_code == 2
    assert run("generate", "somewhere", "--no-such-option").exit_code == 2


def test_our_own_bugs_keep_their_traceback(run, monkeypatch):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr("pipo.cli.generate.collect_prompts", broken)
    result = run("generate", "somewhere", "--prompt", "x")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_interrupted_is_130_and_quiet(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipo.cli.generate.collect_prompts", interrupted)
    result = run("generate", "somewhere", "--prompt", "x")
    assert (result.exit_code, result.output) == (130, "")


def test_json_has_null_for_what_is_no_number(capsys):
    print_json({"nan": float("nan"), "inf": [float("inf")], "pair": (1, "τ")})
    out = capsys.readouterr().out
    assert json.loads(out) == {"nan": None, "inf": [None], "pair": [1, "τ"]}
    assert "τ" in out


def test_ctrl_c_ends_a_command_quietly(pipo_folder):
    command = [sys.executable, "-m", "pipo", "chat", str(pipo_folder)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A shell's background jobs ignore Ctrl-C, and so would their children: tests that run there, too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=heed) as chat:
        said = [chat.stderr.readline() for _ in range(4)]
        assert "/quit" in said[-1]
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate(timeout=60)
    assert (chat.returncode, out, err) == (130, "", "")
