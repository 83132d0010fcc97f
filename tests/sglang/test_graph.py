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
from pipo.integrations.sglang import graph, pair_ids, step
from pipo.integrations.sglang.rows import PairRows

WIDTH = 8


class Model:
    """A second phase whose result tells what it was computed from."""

    config = SimpleNamespace(hidden_size=WIDTH, vocab_size=VOCAB)
    confidence_head = SimpleNamespace(draft=None)
    one = torch.nn.Parameter(torch.ones(()))

    def draft(self, token1, hidden, positions, forward_batch):
        return self.one * hidden + token1[:, None] + positions[:, None]

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
            if new is not None:
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
    assert not phase.logits_RV.requires_grad  # it is changed in place
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


@pytest.mark.parametrize("taus", [[0.0, 0.5, 1.5], [1.5, 1.5, 1.5]])
@pytest.mark.parametrize("sees_draft", [False, True])
def test_a_pair_is_the_same_with_and_without_a_graph(runner, monkeypatch, sees_draft, taus):
    """One row's state is not finite: it ends, and the others do not notice."""
    monkeypatch.setattr(step, "get_parallel", lambda: SimpleNamespace(tp_size=1))
    monkeypatch.setattr(step, "served", lambda: True)
    monkeypatch.setattr(step, "current", lambda: SimpleNamespace(vocab_size=VOCAB))
    model = runner.model_runner.model
    model.confidence_head = SimpleNamespace(draft=True if sees_draft else None)
    one, batch = captured(runner)
    num = len(taus)
    hidden, logits = torch.randn(num, WIDTH), torch.randn(num, VOCAB)
    hidden[1, 3] = torch.nan
    neutral = SimpleNamespace(
        sampling_params=SimpleNamespace(
            frequency_penalty=0, presence_penalty=0, repetition_penalty=1, min_new_tokens=0, stop_token_ids=None
        )
    )
    reqs = [SimpleNamespace(**vars(neutral), pairs=SimpleNamespace(tokens=[], threshold=tau)) for tau in taus]
    info = SimpleNamespace(pairs=PairRows.of(reqs, VOCAB, "cpu"), sampling_seed=None, grammars=None)
    forward = SimpleNamespace(
        forward_mode=step.ForwardMode.DECODE,
        positions=batch.positions[:num],
        sampling_info=info,
        moe_num_token_non_padded=None,
    )
    executor = SimpleNamespace(
        model=model, attn_backend=None, sampler=SimpleNamespace(_sync_token_ids_across_tp=lambda ids, info: None)
    )

    def pairs(graph_or_none):
        output = step.LogitsProcessorOutput(next_token_logits=logits.clone(), hidden_states=hidden)
        if graph_or_none is not None:
            output.pipo_graph = graph_or_none
        return step.around_sample(
            lambda runner, output, batch: output.next_token_logits.argmax(-1), executor, output, forward
        )

    plain, graphed = pairs(None), pairs(one)
    assert torch.equal(plain, graphed)
    assert plain[1] == pair_ids.pair_id(VOCAB, None)
    assert (pair_ids.token2(plain) != pair_ids.NO_TOKEN).tolist() == [tau == 0.0 for tau in taus[:1]] + [False] * 2


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
