"""Peers over a grid of points: each loads the model once, and is asked like any other method of a benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipo.bench.grid import Point, Row
from pipo.bench.peers.peer import Peer
from pipo.bench.peers.process import PeerProcess, Reply, Task
from pipo.bench.sizes import ModelSizes
from pipo.errors import PeerError

CACHE_SLACK = 1.25
"""Blocks that are not full, and blocks that are kept free."""
BLOCK = 256
"""Positions to which caches are rounded, at most."""
WARM_TOKENS = 128


class PeerSubject:
    """A peer among the methods of a benchmark. It loads the model when it is first asked, and again after it failed at a request."""

    def __init__(self, peer: Peer, task: Task) -> None:
        self.peer, self.task = peer, task
        self._process: PeerProcess | None = None
        self._unable: PeerError | None = None

    @property
    def method(self) -> str:
        """As rows call it."""
        return self.peer.method

    def time_batch(self, prompts: Sequence[Sequence[int]], num_steps: int) -> Reply:
        """Run one batch greedily from nothing: the first tokens, then `num_steps` steps.

        Raises:
            PeerError: it could not. One that could not load the model is not asked again.
        """
        if self._unable is not None:
            raise self._unable
        if self._process is None:
            try:
                self._process = PeerProcess(self.peer, self.task)
            except PeerError as error:
                self._unable = error
                raise
        try:
            return self._process.generate(prompts, num_steps + 1)
        except PeerError:
            self.close()
            raise

    @property
    def versions(self) -> dict[str, str]:
        """Of its packages; empty where it is not loaded."""
        return {} if self._process is None else self._process.versions

    def close(self) -> None:
        """End its process, if there is one."""
        if self._process is not None:
            self._process.close()
            self._process = None


@contextmanager
def open_peers(
    peers: Sequence[Peer],
    model: Path,
    sizes: ModelSizes,
    points: Sequence[Point],
    num_steps: int,
    *,
    dtype: str,
    device: str,
    num_threads: int,
) -> Iterator[list[PeerSubject]]:
    """Peers on the stock checkpoint in the folder `model`, each with room for every point; their processes end with the context.

    Args:
        num_steps: of decoding, at most.
        dtype: `bfloat16`, `float16` or `float32`, as torch calls it.
    """
    batch, positions = max(point.batch for point in points), max(point.context for point in points) + num_steps + 1
    itemsize = 4 if dtype == "float32" else 2
    row_bytes = -(-positions // BLOCK) * BLOCK * sum(layer.entries for layer in sizes.layers) * itemsize
    with ExitStack() as stack:
        subjects = []
        for peer in peers:
            task = Task(
                model=str(model),
                scratch=stack.enter_context(tempfile.TemporaryDirectory(prefix="pipo-peer-")),
                dtype=dtype,
                device=device,
                num_threads=num_threads,
                max_batch=batch,
                max_positions=positions,
                cache_bytes=int(CACHE_SLACK * batch * (row_bytes + sizes.state_bytes)),
            )
            subjects.append(PeerSubject(peer, task))
            stack.callback(subjects[-1].close)
        yield subjects


def measure_peer(
    subject: PeerSubject,
    points: Sequence[Point],
    prompts_of: Callable[[Point], Sequence[Sequence[int]]],
    *,
    num_steps: int,
    num_rounds: int,
    report: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The rows of one peer at all points; where it fails, the row says why.

    Args:
        prompts_of: the prompts of a point, the same for every method.
        report: called after every run, of which a point has `1 + num_rounds`: the first one warms up.
    """
    rows = []
    for point in points:
        prompts = prompts_of(point)
        warm = prompts if subject.task.device != "cpu" else [list(ids)[:WARM_TOKENS] for ids in prompts]
        replies = []
        try:
            for turn in range(1 + num_rounds):
                reply = subject.time_batch(prompts if turn else warm, num_steps if turn else 1)
                replies += [reply] if turn else []
                report()
        except PeerError as error:
            rows.append(Row(method=subject.method, batch=point.batch, context=point.context, error=str(error)))
            continue
        ttft_s, tpot_s = [reply.first_s for reply in replies], [reply.tpot_s for reply in replies]
        rows.append(Row.from_rounds(subject.method, point, ttft_s, tpot_s, num_steps=num_steps))
    return rows
