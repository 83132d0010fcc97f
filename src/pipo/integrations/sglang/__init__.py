"""PIPO on stock SGLang: a plugin that SGLang finds by its entry point once both are installed.

A request's way: `requests` packs its prompt into pair ids; `model` reads pairs; `step` writes the next pair; `requests` unpacks what a
client is to see; `output` streams and counts it. A server with a regular model is left alone.
"""

from __future__ import annotations


def load() -> None:
    """SGLang calls this in each of its processes, before anything else."""
    from pipo.integrations.sglang import config, hooks

    if (wrong := hooks.version_difference()) is not None:
        config.register_refusal(wrong)
        return
    config.register_families()
    hooks.register()
