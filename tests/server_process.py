"""`pipo serve` as a process of its own, and sockets that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

START_S = 120
URL = re.compile(r"Serving at http://127\.0\.0\.1:(\d+)/v1")


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def num_open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def client(self, **headers: str) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=600, max_keepalive_connections=0)
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=60, limits=limits, trust_env=False)

    def metrics(self, **headers: str) -> dict[str, float]:
        text = httpx2.get(f"{self.url}/metrics", headers=headers, timeout=30, trust_env=False).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def wait_until_idle(self, within_s: float, **headers: str) -> float:
        """Seconds until no sample runs or waits."""
        started = time.perf_counter()
        while True:
            metrics = self.metrics(**headers)
            if not metrics['pipo_samples_running{model="pipo"}'] and not metrics['pipo_samples_waiting{model="pipo"}']:
                return time.perf_counter() - started
            assert time.perf_counter() - started < within_s, "samples still run"
            time.sleep(0.02)


@contextlib.contextmanager
def served(folder: Path, log: Path, *options: str, **environment: str) -> Iterator[Served]:
    """Start a server on a free port; it is killed in the end, if it still runs."""
    command = [sys.executable, "-m", "pipo", "serve", str(folder), "--port", "0", "--device", "cpu", *options]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        until = time.perf_counter() + START_S
        while not (found := URL.search(log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.perf_counter() < until, log.read_text()
            time.sleep(0.05)
        yield Served(process, int(found[1]), log)
    finally:
        process.kill()
        process.wait()


async def raw(port: int, data: bytes, limit_s: float = 20) -> bytes:
    """Everything that comes back for these bytes until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), limit_s)
    except ConnectionError:
        return b""
    finally:
        writer.close()
