"""What `import pipo` promises: its names, and that it costs nothing until one is used."""

import subprocess
import sys

import pytest

import pipo
from pipo import errors

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "huggingface_hub")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_all_is_exact():
    assert pipo.__all__ == [
        "LLM",
        "BaseForCausalLM",
        "PipoConfig",
        "PipoError",
        "PipoForCausalLM",
        "RequestOutput",
        "SamplingParams",
        "__version__",
    ]
    assert set(pipo._HOME) == set(pipo.__all__) - {"__version__"}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        pipo.Nonsense  # noqa: B018


HELP = """
import sys
sys.argv = ["pipo", "--help"]
from pipo.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("code", ["import pipo", "import pipo; pipo.PipoError", HELP], ids=["import", "errors", "help"])
def test_loads_nothing_heavy(code):
    check = f"\nimport sys; heavy = [m for m in {HEAVY} if m in sys.modules]; assert not heavy, heavy"
    result = run_python(code + check)
    assert result.returncode == 0, result.stderr


def test_every_error_is_a_pipo_error_and_user_errors_are_value_errors():
    for name in errors.__all__:
        cls = getattr(errors, name)
        assert issubclass(cls, errors.PipoError)
        if cls is not errors.PipoError:
            assert issubclass(cls, ValueError)
        assert f"{name} " in errors.__doc__ or f"{name}\n" in errors.__doc__
