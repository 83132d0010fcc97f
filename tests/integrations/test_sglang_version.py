"""The one SGLang that the plugin is for: said in three places, and the same in each."""

import re
import tomllib
from pathlib import Path

from pipo.integrations.sglang.hooks import SGLANG_VERSION

ROOT = Path(__file__).parents[2]


def test_extra_and_environment_pin_the_plugins_version():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = re.findall(r"^sglang==(.*)$", (ROOT / "tests/sglang/requirements.txt").read_text(), re.MULTILINE)
    assert extras["sglang"] == [f"sglang=={SGLANG_VERSION}"]
    assert pinned == [SGLANG_VERSION]
