"""Compiling the kernels: once per machine, by the compiler that is there, in about three seconds.

The library is kept under the user's cache folder by what it was made from: sources, flags, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch as _torch  # noqa: F401  (its OpenMP is loaded first: with two, each would wait for cores that the other holds)

from pipo.errors import KernelError

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
)
SOURCE = "layer.cpp"
TIMEOUT_S = 300


@cache
def load_library(*more_flags: str) -> ctypes.CDLL:
    """The compiled kernels. `more_flags`: for tests, such as `-DPIPO_PORTABLE`.

    Raises:
        KernelError: no compiler, or it can't compile them; the message says what it said.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *more_flags)
    path = _cache_folder() / f"layer-{_fingerprint(compiler, flags)}.so"
    if not path.is_file():
        _compile(compiler, flags, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"the compiled kernels {path} can't be loaded: {error}; delete the file to compile them again, or "
            "choose kernels='torch'"
        ) from error


def find_compiler() -> str:
    """The C++ compiler's path.

    Raises:
        KernelError: there is none.
    """
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise KernelError(
        f"the CPU kernels need a C++ compiler ({', '.join(COMPILERS)}), and there is none on the path; install one (Debian: g++), or "
        "choose kernels='torch'"
    )


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    source = files("pipo.kernels") / "source" / SOURCE
    # Under another name first: two processes may compile at the same time, and one may be killed.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError as error:
        raise KernelError(
            f"the compiled kernels can't be kept in {path.parent}: {error}; choose kernels='torch'"
        ) from error
    os.close(handle)
    made = Path(name)
    try:
        command = [compiler, *flags, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise KernelError(
                f"{compiler} can't compile the CPU kernels; choose kernels='torch'. It says: {done.stderr[-1000:]}"
            )
        made.replace(path)
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            f"{compiler} did not compile the CPU kernels in {TIMEOUT_S} s; choose kernels='torch'"
        ) from error
    finally:
        made.unlink(missing_ok=True)


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for source in sorted((files("pipo.kernels") / "source").iterdir(), key=lambda path: path.name):
        digest.update(source.name.encode() + source.read_bytes())
    # `-march=native` is another flag on another processor: a home folder may be shared by several.
    target = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull], capture_output=True, check=False
    )
    digest.update(target.stdout)
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    try:
        home = Path.home() / ".cache" / "pipo" / "kernels"
        home.mkdir(parents=True, exist_ok=True)
        return home if os.access(home, os.W_OK) else _own_temporary_folder()
    except (OSError, RuntimeError):  # a user without a home
        return _own_temporary_folder()


def _own_temporary_folder() -> Path:
    """Nobody else can write to it: code is loaded from there."""
    folder = Path(tempfile.gettempdir()) / f"pipo-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise KernelError(
            f"{folder} is open to others, so no compiled kernels are kept or loaded there; choose kernels='torch'"
        )
    return folder
