"""Where PIPO hooks into SGLang: one table. Hooks are applied by SGLang's own plugin framework, which only logs what fails; so
:func:`verify` looks for itself, and stops the server where anything is not as it was when this was written.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipo.errors import UnsupportedModelError

SGLANG_VERSION = "0.5.23"
"""The targets below are private: any other version may mean something else by them."""


@dataclass(frozen=True, slots=True)
class Hook:
    """`function` around, before or after `target`, a dotted name below `sglang.srt`.

    `around` gets the original first; `after` gets its result first; `before` gives new arguments or None.
    """

    target: str
    kind: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    """The target's own, in order."""

    @property
    def path(self) -> str:
        """The whole dotted name."""
        return f"sglang.srt.{self.target}"


def table() -> tuple[Hook, ...]:
    """All hooks. The modules that they live in import SGLang, so they are imported here."""
    from pipo.integrations.sglang import (
        admission,
        arguments,
        config,
        grammar,
        graph,
        lengths,
        logprobs,
        metrics,
        output,
        penalties,
        requests,
        rows,
        step,
        updates,
    )

    inward = (config, arguments, updates, admission, requests, lengths)
    own = (*inward, graph, penalties, rows, step, logprobs, grammar, output, metrics)
    return tuple(hook for module in own for hook in module.HOOKS)


def register() -> None:
    """Hand all hooks to SGLang, which applies them once every plugin is loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in table():
        HookRegistry.register(hook.path, hook.function, HookType(hook.kind))


def verify() -> None:
    """Check that this is the SGLang that the hooks were written for, and that each is in place.

    Raises:
        UnsupportedModelError: names every difference.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    found = [wrong for hook in table() if (wrong := _difference(hook, HookRegistry._patched))]
    if wrong_version := version_difference():
        found.insert(0, wrong_version)
    if found:
        raise UnsupportedModelError("PIPO can't be served by this SGLang: " + "; ".join(found))


def version_difference() -> str | None:
    """What is wrong with the installed version, if anything."""
    from sglang.version import __version__ as found

    return None if found == SGLANG_VERSION else f"the plugin is for sglang {SGLANG_VERSION}, this is {found}"


def _difference(hook: Hook, patched: set[str]) -> str | None:
    try:
        target = pkgutil.resolve_name(hook.path)
    except (ImportError, AttributeError):
        return f"{hook.path} does not exist"
    parameters = tuple(inspect.signature(target).parameters)
    if parameters != hook.parameters:
        return f"{hook.path} takes ({', '.join(parameters)}), not ({', '.join(hook.parameters)})"
    return None if hook.path in patched else f"the hook on {hook.path} was not applied"
