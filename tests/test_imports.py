"""The import rule of docs/architecture.md: imports go one way, at the top of a file or in a function, relative or not.

Also here: the environment is read in `cli/` only.
"""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"

# Each package, with the packages of ours that it may import (itself always).
FOUNDATION = {"errors", "pairing"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "pairing": {"errors"},
    "pair_memory": {"pairing"},
    "reliability": set(),
    "losses": FOUNDATION,
    "kernels": {"errors"},
    "model": FOUNDATION | {"losses", "kernels"},
    "run_record": set(),
    "pages": {"reliability"},
    "reference": FOUNDATION | {"losses", "model"},
    "data": FOUNDATION | {"losses", "model"},
    "engine": FOUNDATION | {"losses", "model", "data", "pair_memory"},
    "training": FOUNDATION | {"losses", "model", "data", "run_record", "reliability"},
    "server": FOUNDATION | {"losses", "model", "data", "engine", "training"},
    "evaluation": FOUNDATION | {"data", "engine", "run_record", "reliability", "pages"},
    "bench": FOUNDATION | {"losses", "kernels", "model", "data", "engine", "training", "run_record", "pages"},
    "demo": FOUNDATION
    | {"losses", "model", "data", "engine", "training", "evaluation", "run_record", "reliability"}
    | {"pages"},
    "integrations": FOUNDATION | {"losses", "model", "pair_memory"},
    "cli": FOUNDATION
    | {"losses", "model", "reference", "data", "engine", "training", "server", "evaluation", "bench", "demo"}
    | {"run_record"},
    # The package itself: lazy names and the entry point.
    "__init__": {"errors", "model", "engine", "_autoclasses"},
    "__main__": {"cli"},
    "_autoclasses": {"model"},
}
# `training/rollout` is the one place of training that touches the engine.
EXCEPTIONS = {("pipo.training.rollout", "engine")}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names of everything that `source` imports, wherever in the file it does."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "pipo":  # `from pipo import x` names a module or a public name: judged as `pipo.x`
                found.update(f"pipo.{alias.name}" for alias in node.names)
            else:
                found.add(origin)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "import_module"}:
            found.update(str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return found


PUBLIC_HOMES = {
    "LLM": "engine",
    "BaseForCausalLM": "model",
    "PipoConfig": "model",
    "PipoError": "errors",
    "PipoForCausalLM": "model",
    "RequestOutput": "engine",
    "SamplingParams": "engine",
}


def breaches(source: str, module: str, is_package: bool) -> list[str]:
    """What in `source` breaks the rule, as readable lines."""
    own = module.split(".")[1] if module != "pipo.__init__" else "__init__"
    if own not in ALLOWED:
        return [f"{module}: package {own!r} has no place in the import order"]
    wrong = []
    for name in imported_modules(source, module, is_package):
        parts = name.split(".")
        if parts[0] != "pipo" or len(parts) == 1 or parts[1] in {own, "__version__"}:
            continue
        target = PUBLIC_HOMES.get(parts[1], parts[1])
        if target != own and target not in ALLOWED[own] and (module, target) not in EXCEPTIONS:
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize("path", sorted(SRC.glob("pipo/**/*.py")), ids=lambda p: module_name(p))
def test_imports_go_one_way(path):
    assert breaches(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import pipo.engine.llm", "pipo.model.config"),
        ("from pipo.engine import llm", "pipo.model.config"),
        ("from pipo import LLM", "pipo.model.config"),
        ("from ..engine import llm", "pipo.model.config"),
        ("from .. import engine", "pipo.model.config"),
        ("def f():\n    from pipo.demo import world", "pipo.engine.llm"),
        ("import importlib\nimportlib.import_module('pipo.demo')", "pipo.engine.llm"),
        ("from pipo.engine import llm", "pipo.training.sft"),
        ("from pipo.model import config", "pipo.pairing"),
        ("from pipo.engine import llm", "pipo.integrations.vllm.model"),
        ("import torch", "pipo.somewhere.new"),
    ],
)
def test_the_rule_notices(source, module):
    assert breaches(source, module, is_package=False)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from pipo.model import config", "pipo.engine.llm"),
        ("from . import config", "pipo.model.modeling"),
        ("from pipo.engine import llm", "pipo.training.rollout"),
        ("from pipo import LLM, PipoError", "pipo.cli.generate"),
        ("import pipo", "pipo.cli.main"),
    ],
)
def test_the_rule_lets_pass(source, module):
    assert breaches(source, module, is_package=False) == []


def reads_environment(source: str) -> bool:
    names = {"os.environ", "os.getenv", "os.environb"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names:
            return True
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names}
            & {
                "environ",
                "getenv",
            }
        ):
            return True
    return False


def test_the_environment_is_read_in_cli_only():
    readers = {module_name(p) for p in SRC.glob("pipo/**/*.py") if reads_environment(p.read_text())}
    assert {m for m in readers if not m.startswith("pipo.cli.")} == set()
    assert reads_environment("import os\nos.environ['A']")
    assert reads_environment("from os import getenv")
