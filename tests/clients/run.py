"""Clients that others wrote, against a real `pipo serve` on a tiny checkpoint: `make test-clients`.

Each client lives in an environment of its own, `.venvs/NAME`, made from `NAME.txt` beside this file. Nothing is skipped: an environment
that is missing is a failure. With names as arguments (`python tests/clients/run.py litellm llm`), only those run. evalscope, whose
environment takes more than a gigabyte, runs only when it is named: `make test-load`.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

KEY = "sesame"
LIMIT_S = 400


@dataclass(frozen=True)
class Client:
    """A client: the environment that it lives in, its package there, and how it is run (`{url}`, `{key}`, `{folder}` are filled in)."""

    venv: str
    package: str
    command: tuple[str, ...]


def pytest_of(module: str) -> tuple[str, ...]:
    """Run one file of tests, without this project's own configuration."""
    options = (
        "-c",
        "/dev/null",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=short",
        "--strict-markers",
        "--rootdir",
        str(HERE),
    )
    return ("python", "-m", "pytest", *options, str(HERE / module))


SCHEMATHESIS = (
    "st", "run", "{url}/openapi.json", "--header", "Authorization: Bearer {key}", "--max-examples", "40", "--seed", "1",
    "--phases", "examples,coverage,fuzzing", "--checks", "all",
    # A request can fit the schema and still not be served: another model's name, a prompt beyond the context.
    "--exclude-checks", "positive_data_acceptance",
    "--request-timeout", "60", "--max-failures", "20", "--suppress-health-check", "all",
)  # fmt: skip

CLIENTS = {
    "openai-2": Client("openai2", "openai", pytest_of("check_openai.py")),
    "openai-3": Client("openai3", "openai", pytest_of("check_openai.py")),
    "litellm": Client("openai2", "litellm", pytest_of("check_litellm.py")),
    "langchain-openai": Client("openai2", "langchain-openai", pytest_of("check_langchain.py")),
    "llm": Client("openai3", "llm", pytest_of("check_llm.py")),
    "schemathesis": Client("schemathesis", "schemathesis", SCHEMATHESIS),
    "evalscope": Client("load", "evalscope", ("python", str(HERE / "check_load.py"))),
}
LIGHT = tuple(name for name in CLIENTS if name != "evalscope")


def version_of(client: Client) -> str:
    """What is installed there."""
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    python = ROOT / ".venvs" / client.venv / "bin/python"
    if not python.exists():
        raise SystemExit(f"{client.package}: no environment .venvs/{client.venv}; `make test-clients` makes it")
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(client: Client, url: str, folder: Path) -> bool:
    """Run one client to its end; whether it was content."""
    values = {"url": url, "key": KEY, "folder": str(folder)}
    program, *arguments = (part.format(**values) for part in client.command)
    environment = {
        **os.environ,
        "PIPO_URL": url,
        "PIPO_KEY": KEY,
        "PIPO_CHECKPOINT": str(folder / "pipo"),
        "NO_COLOR": "1",
        "SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_hooks.py"),
    }
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    command = [str(ROOT / ".venvs" / client.venv / "bin" / program), *arguments]
    try:
        return subprocess.run(command, env=environment, cwd=folder, timeout=LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"still running after {LIMIT_S} s", flush=True)
        return False


def main(names: list[str]) -> int:
    """Run the clients of these names, or all; 1 where one was not content."""
    from server_process import served
    from tiny_checkpoints import make_checkpoints

    unknown = [name for name in names if name not in CLIENTS]
    if unknown:
        raise SystemExit(f"no client {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    chosen = {name: CLIENTS[name] for name in names or LIGHT}
    versions = {name: version_of(client) for name, client in chosen.items()}
    report = []
    with tempfile.TemporaryDirectory(prefix="pipo-clients-") as place:
        folder = Path(place)
        _, checkpoint = make_checkpoints(folder)
        options = ("--api-key", KEY, "--served-model-name", "tiny", "--max-num-seqs", "8")
        for name, client in chosen.items():
            print(f"== {name} {versions[name]}", flush=True)
            start = time.monotonic()
            with served(checkpoint, folder / f"{name}.log", *options) as server:
                content = run(client, server.url, folder)
            if not content:
                print("-- the server's last words\n" + (folder / f"{name}.log").read_text()[-3000:], flush=True)
            report.append(
                (
                    content,
                    f"{'passed' if content else 'FAILED'}  {name} {versions[name]}  {time.monotonic() - start:.0f} s",
                )
            )
    print("\n".join(["", *(line for _, line in report)]))
    return 0 if all(content for content, _ in report) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
