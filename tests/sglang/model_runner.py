"""SGLang's model runner without its scheduler, server or prefix cache: greedy text of many checkpoints from one process a rank.

A server's start takes most of a minute of a core, so what concerns the model alone is tested with this.

Run as a script, it is one rank: it reads `{"rank", "tp_size", "port", "jobs"}` as JSON from its input, and prints one JSON line per job.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from servers import ON_CPU


@dataclass
class Job:
    """A checkpoint, and what to write with it."""

    folder: str
    prompts: Sequence[Sequence[int]]
    thresholds: Sequence[float]
    num_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    """Of the server."""


def run(jobs: Sequence[Job], tp_size: int = 1) -> list[list[list[int]]]:
    """Greedy token ids for each job's prompts, each rank a process of its own; all ranks must write the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(tp_size)
    ]
    try:
        for rank, process in enumerate(ranks):
            json.dump(
                {"rank": rank, "tp_size": tp_size, "port": port, "jobs": [asdict(job) for job in jobs]}, process.stdin
            )
            process.stdin.close()
            process.stdin = None
        ended = [process.communicate() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, ended, strict=True):
        assert process.returncode == 0, errors[-6000:]
    written = [[json.loads(line) for line in out.splitlines() if line.startswith("[[")] for out, _ in ended]
    assert all(one == written[0] for one in written), "the ranks disagree"
    assert len(written[0]) == len(jobs)
    return written[0]


# --- one rank -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Do the jobs that the input asks for."""
    task = json.load(sys.stdin)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch

    one_batch.get_tokenizer = lambda *args, **kwargs: None
    for job in task["jobs"]:
        runner = _load(one_batch, job, task)
        one_batch.bootstrap.init_parallel_runtime = lambda **kwargs: None  # the ranks have met
        print(json.dumps(_greedy(one_batch, runner, Job(**job))), flush=True)


def _load(one_batch: Any, job: dict[str, Any], task: dict[str, Any]) -> Any:
    from sglang.srt.server_args import PortArgs, ServerArgs

    options = {**ON_CPU, "skip_tokenizer_init": True, "tp_size": task["tp_size"], **job["options"]}
    arguments = ServerArgs(model_path=job["folder"], **options)
    arguments.resolve_once()
    rank = task["rank"]
    world_rank = one_batch.spawn_world_rank(arguments, tp_rank=rank, pp_rank=0)
    one_batch.publish(arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=world_rank, gpu_id=rank))
    one_batch._init_process_global_configs()
    ports = PortArgs.init_new(arguments)
    ports.nccl_port = task["port"]
    return one_batch.load_model(arguments, ports, rank, rank)[0].torch_runner


def _greedy(one_batch: Any, runner: Any, job: Job) -> list[list[int]]:
    from sglang.srt.managers.schedule_batch import Req

    from pipo.integrations.sglang import pair_ids

    requests = []
    for index, (prompt, threshold) in enumerate(zip(job.prompts, job.thresholds, strict=True)):
        request = Req(str(index), "", array("q", prompt), _parameters(job.num_tokens, threshold))
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len, request.extend_end = -1, len(request.origin_input_ids)
        requests.append(request)
    ids_R, _, batch = one_batch.extend(requests, runner)
    steps = [ids_R.tolist()]
    for _ in range(job.num_tokens - 1):  # a step writes one token at least
        ids_R, _ = one_batch.decode(ids_R, batch, runner)
        steps.append(ids_R.tolist())
    return [pair_ids.tokens_of(row)[: job.num_tokens] for row in zip(*steps, strict=True)]


def _parameters(num_tokens: int, threshold: float) -> Any:
    from sglang.srt.sampling.sampling_params import SamplingParams

    chosen = SamplingParams(temperature=0, max_new_tokens=num_tokens, custom_params={"threshold": threshold})
    chosen.normalize(None)
    return chosen


if __name__ == "__main__":
    main()
