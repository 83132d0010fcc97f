"""transformers knows `pipo` after `import pipo`, whichever is imported first, and nothing heavy is loaded for it."""

import subprocess
import sys
from pathlib import Path

import pytest

ORDERS = {
    "pipo-first": "import pipo\nfrom transformers import AutoModelForCausalLM",
    "transformers-first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport pipo",
    # Both load transformers' tables halfway through its own modules.
    "through-a-model": "import pipo\nfrom transformers import Qwen3ForCausalLM",
    "through-the-trainer": "import transformers\nimport pipo\nfrom transformers import Trainer",
}


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_knowing_the_name_costs_nothing():
    run_python(
        "import pipo\nfrom transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "import sys; assert 'pipo' in CONFIG_MAPPING and 'qwen3' in CONFIG_MAPPING\n"
        "assert 'pipo.model' not in sys.modules"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from pipo import PipoForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    PipoForCausalLM.from_pretrained(Path(__file__).parent / "golden" / "tiny-linear-untied").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_a_checkpoint_opens_by_the_auto_classes(order, folder):
    run_python(
        f"{order}\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        f"assert type(AutoConfig.from_pretrained({str(folder)!r})) is pipo.PipoConfig\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model) is pipo.PipoForCausalLM"
    )


def test_a_config_makes_a_model(folder):
    run_python(
        f"import pipo\nconfig = pipo.PipoConfig.from_pretrained({str(folder)!r})\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert type(AutoModelForCausalLM.from_config(config)) is pipo.PipoForCausalLM"
    )
