"""What stops a server before it serves: an SGLang that is not the one the hooks were written for. No server is started."""

import inspect
import subprocess
import sys

import pytest

from checkpoints import save_pipo, save_regular
from pipo.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def hooks():
    """The plugin as any process of a server loads it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from pipo.integrations.sglang import hooks

    return hooks


def test_every_hook_is_in_place(hooks):
    hooks.verify()


def test_another_signature_is_told_with_both(hooks, monkeypatch):
    from sglang.srt.managers.schedule_batch import Req

    monkeypatch.setattr(Req, "update_finish_state", lambda self, num_new, other: None)
    with pytest.raises(UnsupportedModelError) as raised:
        hooks.verify()
    assert "Req.update_finish_state takes (self, num_new, other), not (self, new_accepted_len)" in str(raised.value)


def test_a_missing_target_is_named(hooks, monkeypatch):
    from sglang.srt.model_executor.model_runner import ModelRunner

    monkeypatch.delattr(ModelRunner, "sample")
    with pytest.raises(UnsupportedModelError, match=r"ModelRunner\.sample does not exist"):
        hooks.verify()


def test_a_hook_that_was_not_applied_is_named(hooks, monkeypatch):
    """SGLang only logs it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    path = "sglang.srt.managers.schedule_batch.Req.__init__"
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {path})
    with pytest.raises(UnsupportedModelError, match=r"the hook on .*Req\.__init__ was not applied"):
        hooks.verify()


def test_every_difference_is_told_at_once(hooks, monkeypatch):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.model_runner import ModelRunner

    monkeypatch.setattr(hooks, "SGLANG_VERSION", "0.0.1")
    monkeypatch.delattr(ModelRunner, "sample")
    monkeypatch.setattr(Req, "update_finish_state", lambda self: None)
    with pytest.raises(UnsupportedModelError, match=r"for sglang 0\.0\.1.*update_finish_state.*sample"):
        hooks.verify()


def test_options_are_known_to_sglang(hooks):
    """A name that SGLang dropped or changed would never be refused."""
    from sglang.srt.server_args import ServerArgs

    from pipo.integrations.sglang.arguments import SERVED

    assert set(SERVED) <= set(inspect.signature(ServerArgs).parameters)


WITH = """
import sys
version, folder, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
import sglang.version
if version:
    sglang.version.__version__ = version
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
from sglang.srt.arg_groups.model_override_base import model_config_of
arguments = ServerArgs(model_path=folder, device="cpu", **options)
arguments.resolve_once()
from sglang.srt.model_loader.utils import get_model_architecture
config = model_config_of(arguments)
model_class = get_model_architecture(config)[0]
print("MODEL", model_class.__module__, model_class.__name__)
if not model_class.__module__.startswith("sglang."):
    model_class(config=config.hf_config)
"""
"""The way of a server to its model's class."""


def started(folder, version="", **options):
    command = [sys.executable, "-c", WITH, version, str(folder), repr(options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layout", ["ours", "flat"])
def test_another_version_serves_no_pipo_checkpoint(tmp_path, layout):
    save_pipo(tmp_path / "pipo", "qwen3_5", layout=layout)
    ended = started(tmp_path / "pipo", version="0.5.99")
    assert ended.returncode != 0
    assert "UnsupportedModelError" in ended.stderr
    assert "the plugin is for sglang 0.5.23, this is 0.5.99" in ended.stderr.splitlines()[-1]


def test_another_version_serves_regular_checkpoints(tmp_path):
    save_regular(tmp_path / "regular", "qwen3")
    ended = started(tmp_path / "regular", version="0.5.99")
    assert "MODEL sglang.srt.models.qwen3 Qwen3ForCausalLM" in ended.stdout, ended.stderr


def test_what_is_not_served_ends_a_start_with_one_line(tmp_path):
    save_pipo(tmp_path / "pipo", "qwen3")
    ended = started(tmp_path / "pipo", pp_size=2, dtype="float32")
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[-1] == (
        "pipo.errors.UnsupportedModelError: a PIPO checkpoint is not served on SGLang with --pp-size 2 (only 1)"
    )
