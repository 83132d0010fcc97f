"""What can be told about GPU graphs without a GPU: what is captured and replayed, and that a wrong graph stops the server."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from checkpoints import VOCAB, save_pipo, save_regular
from pipo.errors import PipoError
from pipo.integrations.sglang import graph

WIDTH = 8


class Model:
    """A second phase whose result tells what it was computed from."""

    config = SimpleNamespace(hidden_size=WIDTH, vocab_size=VOCAB)
    confidence_head = SimpleNamespace(draft=None)

    def draft(self, token1, hidden, positions, forward_batch):
        return hidden + token1[:, None] + positions[:, None]

    def second_logits(self, mtp_hidden, forward_batch):
        return mtp_hidden.sum(-1, keepdim=True) * torch.ones(VOCAB)

    def confidence(self, hidden, mtp_hidden, features=None):
        return torch.sigmoid(hidden.mean(-1))


class Backend:
    """Captures by keeping the function, and replays into the tensors of the capture, as a graph does."""

    def __init__(self, spoil=False):
        self.kept, self.spoil = {}, spoil

    def capture_one(self, key, run, capture_inputs=None, post_warmup_hook=None):
        self.kept[key] = run, run()

    def replay(self, key, forward_batch):
        run, outputs = self.kept[key]
        for static, new in zip(outputs, run(), strict=True):
            static.copy_(new + self.spoil)
        return outputs

    def replay_session(self):
        return torch.no_grad()


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(graph, "get_parallel", lambda: SimpleNamespace(tp_size=1))
    return SimpleNamespace(
        backend=Backend(),
        model_runner=SimpleNamespace(model=Model(), dtype=torch.float32),
        model_context=torch.no_grad,
    )


def captured(runner, size=4):
    batch = SimpleNamespace(
        input_ids=torch.zeros(size, dtype=torch.int64), positions=torch.arange(size), moe_num_token_non_padded=None
    )
    return graph.PairGraph(runner, ShapeKey(size=size), batch, attn_backend=None), batch


def test_a_replay_computes_from_what_it_is_given(runner):
    """Of a batch smaller than the graph: its own rows alone, at the positions that SGLang has put in place."""
    one, batch = captured(runner)
    batch.positions += 10
    hidden, token1 = torch.randn(3, WIDTH), torch.tensor([5, 6, 7])
    phase = one.replay(hidden, token1)
    expected = Model().draft(token1, hidden, torch.tensor([10, 11, 12]), None)
    assert torch.equal(phase.mtp_hidden_RH, expected)
    assert torch.equal(phase.logits_RV, Model().second_logits(expected, None))
    assert torch.equal(phase.confidence_R, Model().confidence(hidden, expected))


def test_its_key_is_not_the_key_of_sglangs_graph(runner):
    """The two lie in one table."""
    captured(runner)
    (key,) = runner.backend.kept
    assert key.size == 4
    assert key != ShapeKey(size=4)


def test_a_graph_that_computes_something_else_stops_the_server(runner):
    runner.backend.spoil = True
    with pytest.raises(PipoError, match="batch size 4 computes another"):
        captured(runner)


def test_with_several_ranks_the_first_batch_is_checked(runner, monkeypatch):
    """Before all of them are captured, their graphs cannot talk to each other."""
    monkeypatch.setattr(graph, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    runner.backend.spoil = True
    one, _ = captured(runner)
    with pytest.raises(PipoError, match="another"):
        one.replay(torch.randn(2, WIDTH), torch.tensor([1, 2]))


RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups import cuda_graph_hook
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
cuda_graph_hook.default_cuda_graph_config = lambda: CudaGraphConfig(  # as on a GPU
    decode=PhaseConfig(backend="full"), prefill=PhaseConfig(backend="breakable")
)
for folder, options in json.loads(sys.argv[1]):
    args = ServerArgs(model_path=folder, **{"device": "cuda", **options})
    try:
        cuda_graph_hook.parse_cuda_graph_config(args)
        cuda_graph_hook.apply_cuda_graph_compatibility(args)
        graphs = resolving_view(args).cuda_graph_config
        print("GRAPHS", graphs.decode.backend, graphs.prefill.backend)
    except ValueError as error:
        print("GRAPHS", error)
"""


def test_which_graphs_a_server_captures(tmp_path):
    """Decoding's, and none for prompts: SGLang's default is taken back, and what was asked for by name is refused."""
    save_pipo(tmp_path / "pipo", "llama")
    save_regular(tmp_path / "regular", "llama")
    jobs = [
        ("pipo", {}),
        ("pipo", {"cuda_graph_backend_prefill": "breakable"}),
        ("pipo", {"cuda_graph_backend_decode": "breakable"}),
        ("pipo", {"disable_cuda_graph": True}),
        ("pipo", {"device": "cpu"}),
    ]
    # A regular model in a process of its own: each serves one model.
    runs = [jobs, [("regular", {})]]
    seen = []
    for run in runs:
        given = json.dumps([(str(tmp_path / name), options) for name, options in run])
        ended = subprocess.run([sys.executable, "-c", RESOLVE, given], capture_output=True, text=True, timeout=600)
        seen += [line.removeprefix("GRAPHS ") for line in ended.stdout.splitlines() if line.startswith("GRAPHS")]
        assert ended.returncode == 0, ended.stderr[-3000:]
    default, prompts, parts, none, on_cpu, regular = seen
    assert default == "full disabled"
    assert "--cuda-graph-backend-prefill breakable" in prompts
    assert "not in 'breakable'" in parts
    assert none == on_cpu == "disabled disabled"
    assert regular == "full breakable"
