"""Every error that PIPO raises on purpose, as one tree.

    PipoError
    ├── PairingError            slots, labels or settings that break the rules of pairs
    ├── ConfigError             a setting has a value that it can't have
    ├── DataError               rows, files or datasets that can't be read, or don't hold what they should
    ├── CheckpointError         a checkpoint can't be read, or its keys, shapes or values are wrong
    ├── SandboxError            a program of a model could not be run, which says nothing about the program
    ├── UnsupportedModelError   a model family, or a combination of features, that PIPO can't run
    ├── EndpointError           a server that a run depends on can't be reached, or does not answer as it should
    ├── PeerError               an engine of others that a benchmark compares with is not installed, or failed
    ├── KernelError             the CPU's kernels can't be compiled or loaded on this machine
    ├── TrainingError           a run of training can't go on
    └── RequestError            a generation request that can't be served as asked
        └── ContextLengthError  its prompt leaves no room to generate

Every class below `PipoError` is also a `ValueError`: it reports what the caller passed, and the message says what was
wrong, the value, and what to do. The command line prints such a message and exits with 2. A failed `assert` is
never the caller's fault.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "EndpointError",
    "KernelError",
    "PairingError",
    "PeerError",
    "PipoError",
    "RequestError",
    "SandboxError",
    "TrainingError",
    "UnsupportedModelError",
]


class PipoError(Exception):
    """Root of the tree: catch this to catch whatever PIPO raises on purpose."""


class PairingError(PipoError, ValueError):
    """Slots, labels or settings break the rules of pairs; the message says which rule and where."""


class ConfigError(PipoError, ValueError):
    """A setting has a value that it can't have; the message names the setting and the value."""


class DataError(PipoError, ValueError):
    """Rows, files or datasets can't be read, or don't hold what they should; the message names the file and the line."""


class CheckpointError(PipoError, ValueError):
    """A checkpoint is missing, unreadable, incomplete or not what was asked for; the message names file and keys."""


class SandboxError(PipoError, ValueError):
    """A program of a model could not be run, which says nothing about the program; the message says what the sandbox said."""


class UnsupportedModelError(PipoError, ValueError):
    """A model family, or a feature on this family, is not supported; the message names it and the reason."""


class EndpointError(PipoError, ValueError):
    """A server that a run depends on can't be reached or does not answer as it should; the message names its address and words."""


class PeerError(PipoError, ValueError):
    """An engine of others that a benchmark compares with is not installed, can't run the model, or failed; the message has its words."""


class KernelError(PipoError, ValueError):
    """The CPU's kernels can't be compiled or loaded on this machine; the message says what is missing or what the compiler said."""


class TrainingError(PipoError, ValueError):
    """A run of training can't go on: its folder is another run's, its numbers are not finite, one of its processes failed."""


class RequestError(PipoError, ValueError):
    """A generation request can't be served: its prompt, its parameters or its length."""


class ContextLengthError(RequestError):
    """The prompt leaves no room to generate; the message names both lengths."""
