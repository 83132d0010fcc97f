"""The engines of others that a benchmark can compare with, and how each is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipo.errors import ConfigError

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine, and the interpreter whose environment has it."""

    name: str
    """As it is asked for."""
    method: str
    """As its rows call it."""
    package: str
    """As `pip` calls it."""
    worker: Path
    """The program that runs it there."""
    options: Mapping[str, object] = field(default_factory=dict)
    """What the worker is told beside the task."""
    python: Path = Path(sys.executable)
    """The interpreter; by default this one."""


_ALL = (
    Peer("hf", "hf-generate", "transformers", WORKERS / "run_hf.py"),
    Peer("hf-static", "hf-static", "transformers", WORKERS / "run_hf.py", {"cache": "static"}),
    Peer("vllm", "vllm", "vllm", WORKERS / "run_vllm.py"),
    Peer("sglang", "sglang", "sglang", WORKERS / "run_sglang.py"),
    Peer("llamacpp", "llamacpp", "llama-cpp-python", WORKERS / "run_llamacpp.py"),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def choose_peers(names: Sequence[str], pythons: Sequence[str] = ()) -> list[Peer]:
    """The peers of these names, each with its interpreter.

    Args:
        names: of `PEERS`.
        pythons: `NAME=PATH`, the interpreter of an environment that has this peer.

    Raises:
        ConfigError: no such peer, one named twice, or an interpreter that is none.
    """
    paths: dict[str, Path] = {}
    for given in pythons:
        name, equals, path = given.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"--peer-python must be NAME=PATH with one of the chosen peers' names, got {given!r}")
        if not (Path(path).is_file() and os.access(path, os.X_OK)):
            raise ConfigError(f"--peer-python {given}: {path} is no interpreter; name the bin/python of an environment")
        paths[name] = Path(path).absolute()
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"there is no peer {name!r}; the peers are {', '.join(PEERS)}")
        if list(names).count(name) > 1:
            raise ConfigError(f"the peer {name!r} is asked for twice")
    return [replace(PEERS[name], python=paths.get(name, PEERS[name].python)) for name in names]
