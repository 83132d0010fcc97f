"""Engines of others beside ours: the processes they run in, and what is told of those that can't."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipo.bench import latency
from pipo.bench.cost import Machine
from pipo.bench.grid import Point, Results, Row, read_results
from pipo.bench.latency import Effort, bench_latency
from pipo.bench.peers import PEERS, Peer, PeerProcess, Task, choose_peers, open_peers
from pipo.bench.peers.peer import WORKERS
from pipo.bench.sizes import model_sizes
from pipo.bench.subjects import Setting, open_subjects, random_prompts, regular_checkpoint
from pipo.cli.main import app
from pipo.errors import ConfigError, PeerError
from pipo.model.base import BaseForCausalLM
from pipo.model.config import PipoConfig
from pipo.model.modeling import PipoForCausalLM
from pipo.model.shapes import shape_config

SETTING = Setting(shape="tiny", dtype="float32", methods=("regular",))
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


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring a machine takes seconds; `test_machine.py` does it."""
    machine = Machine("a slow one", bytes_per_s=1e9, flops_per_s=1e10, memory_bytes=1e10)
    monkeypatch.setattr(latency, "measure_machine", lambda device, dtype: machine)


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str], Peer]:
    """A peer whose worker is the given program, run by this interpreter."""

    def make(program: str) -> Peer:
        path = tmp_path / "worker.py"
        path.write_text(program)
        return Peer("stub", "stub", "stub", path)

    return make


def run(peers: list[Peer], points: list[Point], **more: Any) -> Results[Row]:
    return bench_latency(SETTING, points, Effort(num_steps=2, num_rounds=2), peers=peers, **more)


def test_hugging_face_continues_as_our_regular_decoding() -> None:
    """Breaks when a peer runs other weights, reads other prompts, or stops early."""
    [ours], point = open_subjects(SETTING, max_num_seqs=2), Point(2, 6)
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(ours.llm.vocab_size, 2, 6)]
    outputs = ours.llm.generate(prompts, ours.params(max_tokens=5))
    sizes = model_sizes(ours.config)
    with open_peers([PEERS["hf"]], SETTING, sizes, torch.float32, [point], 4) as [subject]:
        reply = subject.time_batch(point, num_steps=4)
        folder = Path(subject.task.model)
        assert "transformers" in subject.versions
    assert reply.tokens == [output.token_ids for output in outputs]
    assert 0 < reply.first_s < reply.seconds
    assert not folder.exists()


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
        (
            STUB + "sys.exit('OSError: no file\\nnow I end')",
            "ended with status 1 at loading the model: OSError: no file",
        ),
        (STUB + "os.kill(os.getpid(), 9)", "stub ended with status -9 at loading the model: it said nothing"),
        (STUB + "print('Loading weights')", "an answer that is none at loading the model: 'Loading weights'"),
        (STUB + "print('[]')", r"an answer that is none at loading the model: '\[\]'"),
        (STUB + "say(failed='ValueError: no such family')", "stub failed at loading .*: ValueError: no such family"),
        (LOADED + "say(failed='full')", "stub failed at 2 prompts of 4 tokens: full"),
        (LOADED + "say(first_s=1.0, seconds=2.0)", "an answer that is none at 2 prompts"),
        (LOADED + "say(first_s=1.0, seconds=2.0, tokens=[[1, 2], [3]])", r"wrote \[2, 1\] tokens instead of 2"),
        (LOADED + "raise SystemExit(3)", "stub ended with status 3 at 2 prompts of 4 tokens"),
    ],
    ids=[
        "error",
        "last-error",
        "killed",
        "chatter",
        "not-an-object",
        "refusal",
        "failure",
        "half-an-answer",
        "short",
        "ended",
    ],
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


def test_rows_stand_beside_ours(stub: Callable[[str], Peer]) -> None:
    """Breaks when a peer's row lacks a figure, or its limit is not regular decoding's."""
    found = run([stub(LOADED + GOOD)], [Point(2, 4)])
    ours, theirs = found.rows
    assert (theirs.method, theirs.batch, theirs.context, theirs.error, theirs.commit) == ("stub", 2, 4, None, None)
    assert (theirs.ttft_s, theirs.tpot_s, theirs.tokens_per_s) == (0.5, 1.0, 2.0)
    assert len(theirs.tpot_rounds_s) == len(theirs.ttft_rounds_s) == 2
    assert (theirs.ceiling, theirs.ttft_floor_s) == (1.0, ours.ttft_floor_s)
    assert theirs.floor_s == pytest.approx(ours.floor_s, rel=0.01)  # from the second token on, ours from the fourth
    assert theirs.middle == 6.0
    assert found.record["peers"] == {"stub": {"stub": "1.0"}}


def test_a_failed_batch_is_a_row_and_the_run_goes_on(stub: Callable[[str], Peer]) -> None:
    """Breaks when one point that does not fit takes the others with it."""
    program = LOADED + "assert len(request['prompts']) != 2, 'too many'\n    " + GOOD
    reports: list[int] = []
    found = run([stub(program)], [Point(1, 4), Point(2, 4), Point(3, 4)], report=reports.append)
    rows = [row for row in found.rows if row.method == "stub"]
    assert [row.tpot_s for row in rows] == [1.0, None, 1.0]
    assert rows[1].error is not None
    assert "too many" in rows[1].error
    assert reports == [18] * 18
    assert found.complete


def test_a_model_that_can_t_be_loaded_is_tried_once(stub: Callable[[str], Peer], tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = STUB + f"open({str(log)!r}, 'a').write('x')\nsay(failed='no such family')"
    found = run([stub(program)], [Point(1, 4), Point(2, 4)])
    rows = [row for row in found.rows if row.method == "stub"]
    assert [row.error for row in rows] == ["stub failed at loading the model: no such family"] * 2
    assert log.read_text() == "x"


def test_room_for_every_point() -> None:
    """Breaks when the largest batch with the longest prompt does not fit into the cache that a peer is told to make."""
    sizes, points = model_sizes(shape_config("tiny")), [Point(1, 500), Point(4, 20)]
    with open_peers([PEERS["hf"]], SETTING, sizes, torch.bfloat16, points, 3) as [subject]:
        task = subject.task
    assert (task.max_batch, task.max_positions, task.dtype) == (4, 504, "bfloat16")
    assert task.num_threads == torch.get_num_threads()
    assert task.cache_bytes >= 4 * 504 * 6 * 2 * 128 * 2
    assert not Path(task.scratch).exists()


def test_a_checkpoint_runs_as_it_is(tmp_path: Path) -> None:
    """A regular one is not written again; a PIPO one alone has nothing that others could run."""
    BaseForCausalLM.from_config(shape_config("tiny"), mtp=False).save_pretrained(tmp_path / "base")
    setting = Setting(models=(str(tmp_path / "base"),))
    assert regular_checkpoint(setting, tmp_path / "scratch") == tmp_path / "base"
    assert not (tmp_path / "scratch").exists()
    PipoForCausalLM(PipoConfig(shape_config("tiny"))).save_pretrained(tmp_path / "pipo")
    with pytest.raises(ConfigError, match="is a PIPO checkpoint: name a regular one, too"):
        regular_checkpoint(Setting(models=(str(tmp_path / "pipo"),)), tmp_path / "scratch")


def test_the_command_tells_who_could_not_run(tmp_path: Path) -> None:
    """The whole way, with a peer that is not here: breaks when it is left out without a word, or ends the run."""
    options = [
        "--shape",
        "tiny",
        "--methods",
        "regular",
        "--batch",
        "1",
        "--context",
        "4",
        "--steps",
        "2",
        "--rounds",
        "1",
    ]
    options += ["--device", "cpu", "--json", str(tmp_path / "rows.json")]
    shown = CliRunner().invoke(app, ["bench", "latency", *options, "--peers", "vllm"])
    assert shown.exit_code == 0, shown.output
    assert "vllm, batch 1, context 4: vllm is not installed" in shown.output
    rows = read_results(tmp_path / "rows.json", "latency", Row).rows
    assert [row.method for row in rows] == ["regular", "vllm"]
    assert "vllm is not installed" in str(rows[1].error)
    wrong = CliRunner().invoke(app, ["bench", "latency", *options, "--peers", "hf,tgi"])
    assert wrong.exit_code == 2
    assert "there is no peer 'tgi'" in wrong.output


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
