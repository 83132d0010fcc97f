"""Make transformers' `AutoConfig` and `AutoModelForCausalLM` know `model_type: pipo` after `import pipo`, at no cost.

Registering needs `PipoConfig`, which needs transformers, which `import pipo` must not load. So the name alone is
entered in transformers' table of config classes: at once where that table is loaded already, else right after it
gets loaded (an import hook). The table finds the class of a name in the module `transformers.models.<name>`; there a
stand-in answers, which loads `pipo.model` when somebody first opens a PIPO checkpoint; and `pipo.model` registers itself.

Loading it from the hook itself would not do: transformers loads its tables halfway through its own modules, and
`pipo.model` would meet those half-made.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "pipo"
CONFIG_CLASS = "PipoConfig"
TABLE_MODULE = "transformers.models.auto.configuration_auto"
STAND_IN = f"transformers.models.{MODEL_TYPE}"


class _StandIn(ModuleType):
    """The module `transformers.models.pipo`: `pipo.model` under the name where transformers looks for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # introspection of modules must not load torch
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("pipo.model"), name)


class _TableHook(MetaPathFinder):
    """Finds only transformers' table of configs, and enters our name in it once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE_MODULE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _enter(module)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 (mypy refuses the plain assignment to a method)
        return spec


def _enter(table_module: ModuleType) -> None:
    table_module.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG_CLASS
    sys.modules.setdefault(STAND_IN, _StandIn(STAND_IN, "Stand-in for pipo.model; see pipo._autoclasses."))


def install() -> None:
    """Enter the name now if transformers' table is loaded, else as soon as it is. Repeated calls do nothing more."""
    table_module = sys.modules.get(TABLE_MODULE)
    if table_module is not None:
        _enter(table_module)
    elif not any(isinstance(finder, _TableHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableHook())
