"""Engines of others beside ours: the processes they run in, and what is told of those that can't."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipo.bench.grid import Point
from pipo.bench.peers import PEERS, Peer, PeerProcess, Task, choose_peers, measure_peer, open_peers
from pipo.bench.peers.peer import WORKERS
from pipo.bench.sizes import model_sizes
from pipo.engine.llm import LLM
from pipo.engine.request import SamplingParams
from pipo.errors import ConfigError, PeerError
from pipo.model.backbone import build_causal_lm
from pipo.model.base import BaseForCausalLM
from pipo.model.shapes import shape_config

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12]]
TASK = Task("unused", "unused", "float32", "cpu", 1, max_batch=2, max_positions=16, cache_bytes=1 << 20)

# A worker's first lines, for stubs that are no engine.
STUB = """
import json, os, subprocess, sys, time
def say(**content): print(json.dumps(content), flush=True)
task = json.loads(sys.stdin.readline())
"""
LOADED = STUB + "say(versions={'stub': '1.0'})\nfor line in sys.stdin:\n    request = json.loads(line)\n    "
GOOD = "say(first_s=0.5, seconds=2.5, tokens=[[3] * request['num_tokens'] for _ in request['prompts']])\n"


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str], Peer]:
    """A peer whose worker is the given program, run by this interpreter."""

    def make(program: str) -> Peer:
        path = tmp_path / "worker.py"
        path.write_text(program)
        return Peer("stub", "stub", "stub", path)

    return make


def test_hugging_face_continues_as_our_regular_decoding(tmp_path: Path) -> None:
    """Breaks when a peer runs other weights, reads other prompts, stops early, or its row lacks a figure."""
    config = shape_config("tiny")
    model = BaseForCausalLM(build_causal_lm(config, torch.float32).eval(), mtp=False)
    model.save_pretrained(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    ours = LLM(model, method="regular").generate([{"prompt_token_ids": ids} for ids in PROMPTS], params)
    points, options = [Point(2, 4)], {"dtype": "float32", "device": "cpu", "num_threads": 1}
    with open_peers([PEERS["hf"]], tmp_path, model_sizes(config), points, 4, **options) as [subject]:
        reply = subject.time_batch(PROMPTS, num_steps=4)
        [row] = measure_peer(subject, points, lambda point: PROMPTS, num_steps=4, num_rounds=2)
    assert reply.tokens == [output.token_ids for output in ours]
    assert 0 < reply.first_s < reply.seconds
    assert (row.method, row.batch, row.context, row.num_steps, row.error) == ("hf-generate", 2, 4, 4, None)
    assert len(row.tpot_rounds_s) == len(row.ttft_rounds_s) == 2
    assert row.tokens_per_s == pytest.approx(2 / row.tpot_s)


def test_a_reply_gives_time_per_token(stub: Callable[[str], Peer]) -> None:
    with PeerProcess(stub(LOADED + GOOD), TASK) as process:
        reply = process.generate(PROMPTS, 5)
    assert process.versions == {"stub": "1.0"}
    assert reply.tokens == [[3] * 5] * 2
    assert (reply.first_s, reply.tpot_s) == (0.5, 0.5)


def test_a_package_that_is_not_there_is_told() -> None:
    """The real worker in this environment, which has no vLLM: breaks when a peer is left out without a word."""
    with pytest.raises(
        PeerError, match=rf"vllm is not installed: {sys.executable} has no vllm; name another .*vllm=PATH"
    ):
        PeerProcess(PEERS["vllm"], TASK)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (STUB + "sys.exit('out of memory')", "stub ended with status 1 at loading the model: out of memory"),
        (STUB + "os.kill(os.getpid(), 9)", "stub ended with status -9 at loading the model: it said nothing"),
        (STUB + "print('Loading weights')", "an answer that is none at loading the model: 'Loading weights'"),
        (STUB + "print('[]')", r"an answer that is none at loading the model: '\[\]'"),
        (STUB + "say(failed='ValueError: no such family')", "stub failed at loading .*: ValueError: no such family"),
        (LOADED + "say(failed='full')", "stub failed at 2 prompts of 4 tokens: full"),
        (LOADED + "say(first_s=1.0, seconds=2.0)", "an answer that is none at 2 prompts"),
        (LOADED + "say(first_s=1.0, seconds=2.0, tokens=[[1, 2], [3]])", r"wrote \[2, 1\] tokens instead of 2"),
        (LOADED + "raise SystemExit(3)", "stub ended with status 3 at 2 prompts of 4 tokens"),
    ],
    ids=["error", "killed", "chatter", "not-an-object", "refusal", "failure", "half-an-answer", "short", "ended"],
)
def test_what_goes_wrong_is_told_in_words(stub: Callable[[str], Peer], program: str, words: str) -> None:
    with pytest.raises(PeerError, match=words), PeerProcess(stub(program), TASK) as process:
        process.generate(PROMPTS, 2)


def test_a_peer_that_hangs_is_ended_with_all_it_started(stub: Callable[[str], Peer], tmp_path: Path) -> None:
    """Breaks when a hung engine keeps a GPU's memory after the benchmark has gone on."""
    program = f"child = subprocess.Popen(['sleep', '60'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    with pytest.raises(PeerError, match=r"stub: no answer after 1 s of loading the model"):
        PeerProcess(stub(STUB + program + "time.sleep(60)"), TASK, load_s=1)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)
    with (
        PeerProcess(stub(LOADED + "time.sleep(60)"), TASK, request_s=0.2) as process,
        pytest.raises(PeerError, match=r"no answer after 0\.2 s of 2 prompts"),
    ):
        process.generate(PROMPTS, 2)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_failed_request_is_a_row_and_the_run_goes_on(stub: Callable[[str], Peer], tmp_path: Path) -> None:
    """Breaks when one point that does not fit takes the others with it."""
    program = LOADED + "assert len(request['prompts']) < 3, 'too many'\n    " + GOOD
    points = [Point(1, 4), Point(3, 4), Point(2, 4)]
    options = {"dtype": "float32", "device": "cpu", "num_threads": 1}
    runs: list[int] = []
    with open_peers([stub(program)], tmp_path, model_sizes(shape_config("tiny")), points, 2, **options) as [subject]:
        rows = measure_peer(
            subject,
            points,
            lambda point: [[1] * point.context] * point.batch,
            num_steps=2,
            num_rounds=3,
            report=lambda: runs.append(1),
        )
    assert [row.tpot_s for row in rows] == [1.0, None, 1.0]
    assert rows[1].error is not None
    assert "too many" in rows[1].error
    assert len(runs) == 8


def test_a_model_that_can_t_be_loaded_is_tried_once(stub: Callable[[str], Peer], tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = STUB + f"open({str(log)!r}, 'a').write('x')\nsay(failed='no such family')"
    points = [Point(1, 4), Point(2, 4)]
    options = {"dtype": "float32", "device": "cpu", "num_threads": 1}
    with open_peers([stub(program)], tmp_path, model_sizes(shape_config("tiny")), points, 2, **options) as [subject]:
        rows = measure_peer(subject, points, lambda point: PROMPTS, num_steps=2, num_rounds=1)
    assert [row.error for row in rows] == ["stub failed at loading the model: no such family"] * 2
    assert log.read_text() == "x"


def test_room_for_every_point(tmp_path: Path) -> None:
    """Breaks when the largest batch with the longest prompt does not fit into the cache that a peer is told to make."""
    sizes, points = model_sizes(shape_config("tiny")), [Point(1, 500), Point(4, 20)]
    with open_peers([PEERS["hf"]], tmp_path, sizes, points, 3, dtype="bfloat16", device="cpu", num_threads=2) as [one]:
        task = one.task
    assert (task.max_batch, task.max_positions, task.num_threads) == (4, 504, 2)
    assert task.cache_bytes >= 4 * 504 * 6 * 2 * 128 * 2
    assert not Path(task.scratch).exists()


@pytest.mark.parametrize(
    ("names", "pythons", "words"),
    [
        (["tgi"], [], "no peer 'tgi'; the peers are hf, hf-static, vllm, sglang, llamacpp"),
        (["hf", "hf"], [], "'hf' is asked for twice"),
        (["hf"], ["vllm=/usr/bin/python3"], "must be NAME=PATH with one of the chosen peers"),
        (["vllm"], ["vllm"], "must be NAME=PATH"),
        (["vllm"], ["vllm=/nowhere/python"], "/nowhere/python is no interpreter"),
    ],
)
def test_peers_that_can_t_be_asked_are_refused(names: list[str], pythons: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_peers(names, pythons)


def test_each_peer_runs_where_it_is_said_to() -> None:
    here, there = choose_peers(["hf", "vllm"], [f"vllm={os.path.realpath(sys.executable)}"])
    assert here.python == Path(sys.executable)
    assert there.python == Path(os.path.realpath(sys.executable))


def test_workers_need_nothing_of_ours() -> None:
    """They run where PIPO is not installed, and beside modules named as what they import."""
    for path in sorted(WORKERS.glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "pipo"], path
        assert path.stem not in {"vllm", "sglang", "llama_cpp", "gguf", "transformers"}
    assert {peer.worker for peer in PEERS.values()} <= set(WORKERS.glob("run_*.py"))


def test_what_a_library_prints_is_no_answer(tmp_path: Path) -> None:
    """Breaks when a progress bar on standard output is read as an answer."""
    (tmp_path / "peer_loop.py").write_text((WORKERS / "peer_loop.py").read_text())
    worker = tmp_path / "chatty.py"
    worker.write_text(
        "import os\nfrom peer_loop import serve\n"
        "def load(task):\n    print('loading'); os.system('echo from a child')\n"
        "    def generate(prompts, n, first):\n        print('working'); first(); first(); return [[1] * n for _ in prompts]\n"
        "    return generate\nserve(load, ['numpy'])\n"
    )
    with PeerProcess(Peer("chatty", "chatty", "numpy", worker), TASK) as process:
        assert process.generate(PROMPTS, 3).tokens == [[1] * 3] * 2
        assert set(process.versions) == {"numpy"}


def test_gguf_keeps_the_bits(tmp_path: Path) -> None:
    """Breaks when a tensor goes to another name, or bfloat16 becomes something else on the way."""
    gguf = pytest.importorskip("gguf", reason="gguf is installed where llama.cpp is: .venvs/llamacpp")
    model = BaseForCausalLM.from_config(shape_config("tiny"), mtp=False, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; from gguf_file import write_gguf\n"
         "write_gguf(Path(sys.argv[1]), Path(sys.argv[1]) / 'model.gguf', 'bfloat16')", str(tmp_path)],
        cwd=WORKERS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(list(model.parameters()))
    stored = torch.from_numpy(tensors["blk.3.attn_q.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(stored, model.model.layers[3].self_attn.q_proj.weight)
    norm = torch.from_numpy(tensors["blk.3.attn_norm.weight"].data.copy())
    assert torch.equal(norm, model.model.layers[3].input_layernorm.weight.float())
