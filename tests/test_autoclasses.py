"""transformers knows `pipo` after `import pipo`, whichever is imported first, and nothing heavy is loaded for it."""

import subprocess
import sys

import pytest

ORDERS = {
    "pipo-first": "import pipo\nfrom transformers import AutoConfig",
    "transformers-first": "from transformers import AutoConfig\nimport pipo",
    "halfway": "import transformers\nimport pipo\nfrom transformers import AutoConfig",
}


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_name_is_known_in_any_order(order):
    run_python(
        f"{order}\nfrom transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "import sys; assert 'pipo' in CONFIG_MAPPING and 'qwen3' in CONFIG_MAPPING\n"
        "assert 'torch' not in sys.modules or 'pipo.model' not in sys.modules"
    )
