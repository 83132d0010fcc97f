"""Running programs that a model wrote: bubblewrap, with no network, no files of this machine, and limits on what they take.

A program sees /usr (read-only), a scratch folder in memory and the files that it is given, and only its own processes. Started as
root, the sandbox first becomes nobody: the kernel puts no limit on root's processes. Where no sandbox can be had, nothing runs.

What goes wrong around a program is a `SandboxError`, and never a result of the program.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal, Protocol

from pipo.errors import ConfigError, SandboxError

Status = Literal["ok", "error", "time", "memory", "output"]

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
BOX = "/box"
"""The program's folder: given files read-only, everything else writable and in memory."""
NOBODY = 65534
MEBIBYTE = 2**20
WATCH_MS = 50
ENVIRONMENT = {
    "PATH": SYSTEM_PATH,
    "HOME": BOX,
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}

LAUNCHER = """
import os, resource as r, sys
report, cpu_s, memory, processes, size = map(int, sys.argv[1:6])
os.set_inheritable(report, False)
for what, value in ((r.RLIMIT_CORE, 0), (r.RLIMIT_CPU, cpu_s), (r.RLIMIT_AS, memory), (r.RLIMIT_NPROC, processes), (r.RLIMIT_FSIZE, size)):
    if value >= 0: r.setrlimit(what, (value, value))
most = r.getrlimit(r.RLIMIT_STACK)[1]
deep = min(memory // 2, 2**28)
r.setrlimit(r.RLIMIT_STACK, (deep if most == r.RLIM_INFINITY else min(deep, most), most))
os.write(report, b"+")
try: os.execvp(sys.argv[6], sys.argv[6:])
except OSError as error: os.write(report, str(error).encode())
os._exit(127)
"""
"""Runs in the sandbox, before the program: sets the limits there, where they count no other sandbox's processes. The stack may grow
to 256 MiB, as where such problems come from: the usual 8 MiB end right programs that recurse deeply."""


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    cpu_s: float = 10.0
    """Processor time of each of its processes, rounded up to seconds. A busy machine makes no program fail."""
    wall_s: float | None = None
    """Time on the clock; by default `2 · cpu_s + 2`."""
    memory_bytes: int = 1024 * MEBIBYTE
    """Address space of each process, and resident memory of all together (looked at 20 times a second)."""
    num_processes: int = 32
    """Processes and threads."""
    output_bytes: int = 16 * MEBIBYTE
    """Of standard output, standard error and each file; the scratch folder holds four times as much."""

    @property
    def wall(self) -> float:
        """Seconds on the clock."""
        return 2 * self.cpu_s + 2 if self.wall_s is None else self.wall_s


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    status: Status
    """`ok`: exit status 0; `error`: another one, or a signal; else the limit that it ran into."""
    exit_code: int
    """Of the program; 128 + n where signal n ended it."""
    stdout: bytes
    stderr: bytes
    time_s: float
    """On the clock, the sandbox's own few hundredths included."""


class Sandbox(Protocol):
    """Runs programs. Any thread may call it, several at once."""

    def run(self, command: Sequence[str], files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> Result:
        """Run `command` in a folder with `files` (plain names; all executable).

        Raises:
            SandboxError: it could not be run, through no fault of its own.
        """
        ...

    def close(self) -> None:
        """End what runs, in whatever thread, and run nothing more."""
        ...


class _Closable:
    """What ends programs when it is closed: without it, Ctrl-C would wait for the last of them."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def close(self) -> None:
        """As :meth:`Sandbox.close`."""
        self._closed.set()


class Bubblewrap(_Closable):
    """The sandbox.

    Raises:
        ConfigError: there is no bubblewrap, or it can't build a sandbox on this machine.
    """

    def __init__(self, program: str | None = None, python: str | None = None) -> None:
        super().__init__()
        found = program or shutil.which("bwrap", path=SYSTEM_PATH)
        if found is None:
            raise ConfigError(
                f"programs of a model run in bubblewrap only, which is not installed (no bwrap in {SYSTEM_PATH})"
            )
        self.program = found
        self.python = python or _find_python()
        self._options = self._build_options()
        try:
            self.run(["true"], {}, b"", Limits())
        except SandboxError as error:
            raise ConfigError(f"bubblewrap can't build a sandbox here, so no program is run: {error}") from error

    def _build_options(self) -> list[str]:
        options = [
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
            "--cap-drop",
            "ALL",
            "--hostname",
            "box",
        ]
        options += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        if self._version() >= (0, 8):
            options += ["--disable-userns"]
        options += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            path = Path("/", name)
            if path.is_symlink():
                options += ["--symlink", str(path.readlink()), str(path)]
            elif path.is_dir():
                options += ["--ro-bind", str(path), str(path)]
        for name in ("/etc/alternatives", "/etc/ld.so.cache"):
            options += ["--ro-bind-try", name, name]
        prefix = Path(self.python).resolve().parents[1]
        if prefix != Path("/usr"):
            options += ["--ro-bind", str(prefix), str(prefix)]
        return [*options, "--proc", "/proc", "--dev", "/dev"]

    def _version(self) -> tuple[int, ...]:
        try:
            done = subprocess.run(
                [self.program, "--version"], capture_output=True, text=True, check=True, env={}, timeout=10
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"{self.program} doesn't run: {error}") from error
        return tuple(int(number) for number in re.findall(r"\d+", done.stdout)[:2])

    def run(self, command: Sequence[str], files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> Result:
        """As :meth:`Sandbox.run`."""
        with contextlib.ExitStack() as stack:
            scratch = [str(4 * limits.output_bytes), "--tmpfs"]
            options = [
                *self._options,
                "--size",
                *scratch,
                "/dev/shm",
                "--size",
                *scratch,
                BOX,
                "--symlink",
                BOX,
                "/tmp",
            ]
            handles = []
            for name, content in files.items():
                handle = stack.enter_context(_filled(content))
                handles.append(handle.fileno())
                options += ["--perms", "0555", "--ro-bind-data", str(handle.fileno()), f"{BOX}/{_plain(name)}"]
            options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", BOX]
            as_nobody = NOBODY if os.geteuid() == 0 else None
            launch = [self.program, *options, "--", self.python]
            return _run(launch, command, stdin, limits, handles, "/", as_nobody, self._closed)


class UnsafeLocal(_Closable):
    """No sandbox at all: the program may do whatever you may. Limits on time, memory and output only."""

    def run(self, command: Sequence[str], files: Mapping[str, bytes], stdin: bytes, limits: Limits) -> Result:
        """As :meth:`Sandbox.run`."""
        with tempfile.TemporaryDirectory(prefix="pipo-box-") as folder:
            for name, content in files.items():
                path = Path(folder, _plain(name))
                path.write_bytes(content)
                path.chmod(0o555)
            # The limit on processes counts all that the user runs, so it can't be kept here.
            return _run(
                [sys.executable], command, stdin, replace(limits, num_processes=-1), [], folder, None, self._closed
            )


def open_sandbox(unsafe_local: bool = False) -> Sandbox:
    """The sandbox of this machine, or none at all where `unsafe_local` asks for that.

    Raises:
        ConfigError: there is none, and `unsafe_local` is off; or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"programs of a model run on Linux only, and this is {sys.platform}")
    return UnsafeLocal() if unsafe_local else Bubblewrap()


def _find_python() -> str:
    """The system's Python, or the one that this program runs on, which the sandbox then sees too."""
    system = Path("/usr/bin/python3")
    return str(system if system.exists() else Path(sys.base_prefix, "bin", "python3"))


def _plain(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise SandboxError(f"a file of a program needs a plain name, got {name!r}")
    return name


def _filled(content: bytes = b"") -> IO[bytes]:
    handle: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    handle.write(content)
    handle.seek(0)
    return handle


def _run(
    outer: list[str],
    command: Sequence[str],
    stdin: bytes,
    limits: Limits,
    handles: list[int],
    folder: str,
    user: int | None,
    closed: threading.Event,
) -> Result:
    """Run `outer` (what starts a Python, in a sandbox or not) with the launcher and the program."""
    # Files, not pipes: nothing to feed or drain, and the kernel keeps the limit on output.
    with _filled(stdin) as given, _filled() as out, _filled() as err:
        reader, report = os.pipe()
        cpu_s = int(-(-limits.cpu_s // 1))
        numbers = (report, cpu_s, limits.memory_bytes, limits.num_processes, limits.output_bytes)
        launch = [*outer, "-I", "-S", "-c", LAUNCHER, *map(str, numbers), *command]
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                launch,
                stdin=given,
                stdout=out,
                stderr=err,
                pass_fds=[report, *handles],
                env=ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except OSError as error:
            os.close(reader)
            raise SandboxError(f"{outer[0]} could not be started: {error}") from error
        finally:
            os.close(report)
        with open(reader, "rb") as reports:
            try:
                killed = _watch(process, limits, closed)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said = reports.read()
        time_s = time.monotonic() - start
        stdout, stderr = _content(out, limits), _content(err, limits)
    if said != b"+":
        raise SandboxError(
            (said.removeprefix(b"+") or stderr[-500:]).decode(errors="replace").strip() or "it said nothing"
        )
    return _judge(process.returncode, killed, stdout, stderr, time_s, limits)


def _content(handle: IO[bytes], limits: Limits) -> bytes:
    handle.seek(0)
    return handle.read(limits.output_bytes)


def _judge(code: int, killed: Status | None, stdout: bytes, stderr: bytes, time_s: float, limits: Limits) -> Result:
    code = 128 - code if code < 0 else code
    status: Status = "ok" if code == 0 else "error"
    if killed is not None:
        status = killed
    elif code == 128 + signal.SIGXCPU or (code == 128 + signal.SIGKILL and time_s >= limits.cpu_s):
        status = "time"
    elif max(len(stdout), len(stderr)) >= limits.output_bytes:
        status = "output"
    return Result(status, code, stdout, stderr, time_s)


def _watch(process: subprocess.Popen[bytes], limits: Limits, closed: threading.Event) -> Status | None:
    """Wait for the end of a program, or for a limit that the kernel doesn't keep; which one it was.

    Raises:
        SandboxError: the sandbox was closed meanwhile.
    """
    deadline = time.monotonic() + limits.wall
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while not poll.poll(WATCH_MS):
            if closed.is_set():
                raise SandboxError("the sandbox was closed")
            if time.monotonic() > deadline:
                return "time"
            if _resident_bytes(process.pid) > limits.memory_bytes:
                return "memory"
    finally:
        os.close(handle)
    return None


def _resident_bytes(pid: int) -> int:
    """Memory that a process and all its descendants hold; what ends meanwhile counts nothing."""
    total, waiting = 0, [pid]
    while waiting:
        folder = f"/proc/{waiting.pop()}"
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(Path(folder, "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in os.listdir(f"{folder}/task"):
                waiting += map(int, Path(folder, "task", task, "children").read_text().split())
    return total
