"""Captured steps with the host one step late. On a CPU a step is replayed by running it; all else is what a GPU does."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import FAMILIES, base_model, pipo_model
from pipo import LLM, SamplingParams
from pipo.engine import llm as llm_module
from pipo.engine.capture import Step, run_again
from pipo.engine.graph import StepGraphs, is_capturable
from pipo.engine.request import RequestOutput
from pipo.errors import ConfigError, UnsupportedModelError
from pipo.model import static_cache
from pipo.model.config import GATE_SETTINGS
from pipo.model.static_cache import StaticRowCache, on_ladder

FREE = SamplingParams(temperature=0, threshold=0.0, max_tokens=12, ignore_eos=True)


def params(**changes: Any) -> SamplingParams:
    return dataclasses.replace(FREE, **changes)


def prompt(*ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(ids)}


def visible(output: RequestOutput) -> dict[str, Any]:
    """What a result says, but for its timing."""
    return {k: v for k, v in dataclasses.asdict(output).items() if k not in ("ttft_s", "tpot_s")}


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from now on step as on a GPU."""
    monkeypatch.setattr(llm_module, "capture_for", lambda device, wanted: None if wanted is False else run_again)


def graphs_of(llm: LLM) -> StepGraphs:
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    return graphs


MIXED: list[dict[str, Any]] = [
    {},
    {"threshold": 1.01, "max_tokens": 5},
    {"threshold": 0.5, "temperature": 1.0, "seed": 1, "top_k": 20},
    {"temperature": 0.8, "seed": 2, "top_p": 0.9, "threshold": 0.4, "max_tokens": 9},
    {"temperature": 1.0, "seed": 3, "min_p": 0.1, "max_tokens": 3, "n": 2},
    {"temperature": 1.0, "seed": 4, "top_k": 7, "top_p": 0.8, "threshold": 0.6, "ignore_eos": False},
    {"temperature": 1.2, "seed": 5, "stop_token_ids": list(range(3, 30)), "ignore_eos": False, "threshold": 0.3},
]


def requests(number: int, seed: int = 0) -> list[tuple[dict[str, list[int]], SamplingParams]]:
    draw = random.Random(seed)
    return [
        (prompt(*[draw.randrange(3, 150) for _ in range(draw.randrange(1, 40))]), params(**draw.choice(MIXED)))
        for _ in range(number)
    ]


def run_staggered(llm: LLM, asked: list[tuple[Any, SamplingParams]], seed: int, abort: frozenset[int]) -> list[Any]:
    """Requests that arrive at random steps; those in `abort` are given up after a few."""
    draw = random.Random(seed)
    waiting = [llm.prepare(p, s) for p, s in asked]
    samples = [sample for request in waiting for sample in request]
    to_abort = {waiting[i][0].request_id: draw.randrange(2, 6) for i in abort}
    while waiting or llm.engine.has_work:
        if waiting and draw.random() < 0.4:
            llm.engine.add(waiting.pop(0))
        if llm.engine.has_work:
            llm.engine.step()
        for request_id in list(to_abort):
            if any(s.request_id == request_id and len(s.pairs) >= to_abort[request_id] for s in samples):
                llm.engine.abort(request_id)
                del to_abort[request_id]
    return samples


# --- the same texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_writes_without(family: str, replaying: None) -> None:
    model = pipo_model(family)
    asked = [(prompt(*range(3, 4 + 5 * i)), params(threshold=(0.0, 0.5, 1.01)[i], max_tokens=9)) for i in range(3)]
    plain = LLM(model, cuda_graphs=False).generate([p for p, _ in asked], [s for _, s in asked])
    llm = LLM(model)
    assert [visible(o) for o in llm.generate([p for p, _ in asked], [s for _, s in asked])] == [
        visible(o) for o in plain
    ]
    assert graphs_of(llm)._graphs, "nothing was captured, so nothing was tested"


@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_stops_and_aborts_change_nobodys_tokens(seed: int, replaying: None) -> None:
    model = pipo_model(("qwen3", "qwen3_5")[seed % 2], gate=("hidden", "draft")[seed // 2])
    asked = requests(9, seed)
    abort = frozenset(random.Random(seed).sample(range(9), 2))
    alone = [s for p, q in asked for s in LLM(model, cuda_graphs=False).generate(p, q)]
    samples = run_staggered(LLM(model, max_num_seqs=5), asked, seed, abort)
    for sample, one in zip(samples, alone, strict=True):
        output = sample.output()
        if output.finish_reason == "abort":
            assert output.token_ids == one.token_ids[: len(output.token_ids)]
        else:
            assert visible(output) == visible(one)


@pytest.mark.parametrize("method", ["regular", "mtp", "speculative"])
def test_the_baselines_write_what_they_write_without(method: str, replaying: None) -> None:
    model = base_model("qwen3_5" if method == "regular" else "qwen3")
    asked = requests(6, 7)
    plain = [LLM(model, method=method, cuda_graphs=False).generate(p, s) for p, s in asked]
    samples = run_staggered(LLM(model, method=method, max_num_seqs=4), asked, 3, frozenset())
    assert [visible(s.output()) for s in samples] == [visible(o) for outputs in plain for o in outputs]


@pytest.mark.parametrize("method", ["pipo", "mtp"])
def test_a_draft_vocabulary_changes_nothing_either(method: str, replaying: None) -> None:
    model = pipo_model("qwen3", gate="draft") if method == "pipo" else base_model("qwen3")
    settings: dict[str, Any] = {"method": method, "draft_vocab": 70}
    asked = requests(5, 11)
    plain = [o for p, s in asked for o in LLM(model, cuda_graphs=False, **settings).generate(p, s)]
    llm = LLM(model, **settings)
    with watched_replays(llm) as replays:
        samples = run_staggered(llm, asked, 2, frozenset())
    assert [s.token_ids for s in samples] == [o.token_ids for o in plain]
    assert replays[0] > 5


def test_rows_that_need_the_host_join_and_leave(replaying: None) -> None:
    """While such a row runs, all rows step without a graph; before and after, with one."""
    model = pipo_model("qwen3")
    slow = [
        {"presence_penalty": 1.5},
        {"logprobs": 2, "record_pairs": True},
        {"min_tokens": 4, "ignore_eos": False},
        {"logit_bias": {5: 8.0}},
    ]
    asked = [(prompt(3, 4 + i), params(**s, max_tokens=6, temperature=1.0, seed=i)) for i, s in enumerate(slow)]
    asked = [*requests(3, 1), *asked, *requests(3, 2)]
    alone = [s for p, q in asked for s in LLM(model, cuda_graphs=False).generate(p, q)]
    llm = LLM(model, max_num_seqs=4)
    assert not any(is_capturable(llm.prepare(prompt(3), params(**s))[0]) for s in slow)
    samples = run_staggered(llm, asked, 5, frozenset())
    assert [s.token_ids for s in samples] == [o.token_ids for o in alone]
    assert [(s.counts.num_pairs, s.counts.num_committed) for s in samples] == [
        (o.num_pairs, o.num_committed) for o in alone
    ]


def test_a_preempted_request_goes_on_exactly(replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "SMALLEST_CAPACITY", 16)
    model = pipo_model("qwen3_5")
    asked = [
        (prompt(*range(3, 40 + i)), params(max_tokens=60, temperature=1.0, seed=i, threshold=(0.5, 1.01)[i % 2]))
        for i in range(4)
    ]
    free = [LLM(model, cuda_graphs=False).generate(p, s)[0].token_ids for p, s in asked]
    budget = LLM(model, cuda_graphs=False).engine.budget
    tight = LLM(model, cache_budget_bytes=2 * (budget.row_bytes + 64 * budget.position_bytes))
    left: list[int] = []
    leave = tight.engine._leave
    tight.engine._leave = lambda row: (left.append(row), leave(row))[1]  # type: ignore[method-assign, func-returns-value]
    outputs = tight.generate([p for p, _ in asked], [s for _, s in asked])
    assert len(left) > len(asked)  # more departures than ends
    assert [o.token_ids for o in outputs] == free


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_kept_prefix_holds_what_was_written_and_no_more(family: str, replaying: None) -> None:
    """The step that a row ran after its end must leave no trace in the cache of its reply."""
    model = pipo_model(family)
    first = params(max_tokens=20)
    texts: list[list[int]] = []
    for graphs in (False, None):
        llm = LLM(model, prefix_cache_bytes=1 << 22, remember_pairs=1000, cuda_graphs=graphs)
        reply = llm.generate(prompt(*range(3, 20)), first)[0]
        again = llm.generate(prompt(*range(3, 20), *reply.token_ids, 9, 9), first)[0]
        assert again.num_cached_tokens > 17
        texts.append(again.token_ids)
    assert texts[0] == texts[1]


def test_a_step_that_fails_costs_nobody_a_token(replaying: None) -> None:
    model = pipo_model("qwen3")
    asked = requests(3, 4)
    plain = [LLM(model, cuda_graphs=False).generate(p, s)[0].token_ids for p, s in asked]
    llm = LLM(model)
    samples = [s for p, q in asked for s in llm.prepare(p, q)][: len(asked)]
    llm.engine.add(samples)
    for _ in range(3):
        llm.engine.step()
    read = model.compressor.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    read.remove()
    while llm.engine.has_work:
        llm.engine.step()
    assert [s.token_ids for s in samples] == plain


# --- one step ahead ------------------------------------------------------------------------------------


def test_the_next_step_starts_before_a_result_is_read(replaying: None) -> None:
    llm = LLM(pipo_model("qwen3"))
    order: list[str] = []
    graphs = graphs_of(llm)
    launch = graphs.launch

    def watched(*args: Any) -> Any:
        order.append("launch")
        read = launch(*args)
        return lambda: (order.append("read"), read())[1]  # type: ignore[func-returns-value]

    graphs.launch = watched  # type: ignore[method-assign]
    llm.generate(prompt(3, 4), params(max_tokens=10, threshold=1.01))
    assert order == ["launch", *["launch", "read"] * 8, "read"]  # and no step for nobody at the end


class NoHost(TorchDispatchMode):
    """Fails where the host would have to see a number, which on a GPU means to wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in self.WAITS), f"{func} looks at the device"
        if "index" in str(func) and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            assert not masks, f"{func} by a mask has a shape that the host must be told"
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_replays(llm: LLM) -> Iterator[list[int]]:
    """Every step that is replayed inside must not wait for the device, nor move what it works on."""
    graphs, replays = graphs_of(llm), [0]

    def capture(step: Step, undo: Step) -> Step:
        places: list[int] | None = None

        def replay() -> None:
            nonlocal places
            assert places in (None, addresses(graphs)), "a buffer has moved under a captured step"
            with NoHost():
                step()
            places = addresses(graphs)
            replays[0] += 1

        return replay

    graphs.capture = capture
    graphs._graphs.clear()
    yield replays


def addresses(graphs: StepGraphs) -> list[int]:
    rows = graphs._rows
    assert rows is not None
    found = [rows.ids_RT, rows.position_R, rows.num_rows, rows.table, graphs.cache.length_R]
    for layer in graphs.cache.layers:
        found += [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        found += list(layer.rows().values()) if hasattr(layer, "rows") else []
    return [tensor.data_ptr() for tensor in found]


GROUPED = {"qwen3_5_moe", "qwen3_next", "qwen3_moe", "gpt_oss"}
"""On a CPU transformers runs their experts one by one, on a GPU by grouped products."""


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in GROUPED])
def test_a_step_asks_the_host_nothing_and_moves_nothing(family: str, replaying: None) -> None:
    llm = LLM(pipo_model(family, gate="draft" if family == "qwen3" else "hidden"))
    asked = [params(), *[params(temperature=1.0, seed=1, **s) for s in ({}, {"top_k": 9}, {"min_p": 0.1})]]
    with watched_replays(llm) as replays:
        llm.generate([prompt(3, 4, 5 + i) for i in range(4)], [dataclasses.replace(s, threshold=0.4) for s in asked])
    assert replays[0] > 5


def test_a_top_p_row_asks_the_host_nothing(replaying: None) -> None:
    llm = LLM(base_model("qwen3"), method="regular")
    with watched_replays(llm) as replays:
        llm.generate([prompt(3)] * 2, [params(), params(temperature=1.0, top_p=0.7, seed=1)])
    assert replays[0] > 5


# --- sizes --------------------------------------------------------------------------------------------


def test_few_graphs_serve_many_batches(replaying: None) -> None:
    llm = LLM(pipo_model("qwen3"), max_num_seqs=8)
    llm.generate([prompt(3, 4 + i) for i in range(20)], [params(max_tokens=3 + i) for i in range(20)])
    assert len(graphs_of(llm)._graphs) <= 5  # 1, 2, 3, 4, 6 and 8 rows at one capacity


def test_the_ladder_wastes_a_third_at_most() -> None:
    assert [on_ladder(n, 1) for n in (1, 2, 3, 4, 5, 7, 9, 13, 33)] == [1, 2, 3, 4, 6, 8, 12, 16, 48]
    assert [on_ladder(n, 256) for n in (1, 257, 513, 769, 1025)] == [256, 512, 768, 1024, 1536]
    assert all(n <= on_ladder(n, 1) <= max(2, 1.5 * n) for n in range(1, 1000))


def test_a_longer_capacity_keeps_what_rows_hold(replaying: None) -> None:
    """Texts that outgrow a capacity while others are short, then shrink again."""
    model = pipo_model("qwen3_5")
    asked = [
        (prompt(*[5 + j % 90 for j in range(40 + 500 * i)]), params(max_tokens=30 - 10 * i, threshold=1.01))
        for i in range(3)
    ]
    plain = [LLM(model, cuda_graphs=False).generate(p, s)[0].token_ids for p, s in asked]
    llm = LLM(model)
    assert [o.token_ids for o in llm.generate([p for p, _ in asked], [s for _, s in asked])] == plain
    cache = llm.engine.runner.cache
    assert isinstance(cache, StaticRowCache)
    version = cache.version
    assert [llm.generate(p, s)[0].token_ids for p, s in asked] == plain
    assert cache.version == version, (
        "rows that fit what is there must not replace buffers: graphs would be captured anew"
    )


def test_memory_held_stays_within_the_budget(replaying: None) -> None:
    model = pipo_model("qwen3")
    budget = LLM(model, cuda_graphs=False).engine.budget
    total = 6 * (budget.row_bytes + 300 * budget.position_bytes)
    llm = LLM(model, cache_budget_bytes=total)
    llm.generate([prompt(*range(3, 100))] * 12, params(max_tokens=200))
    assert 0 < llm.engine.runner.cache.num_bytes() <= total


@pytest.mark.parametrize(("entries", "lengths"), [(2304, [(1, 1000), (3, 600)]), (1100, [(1, 600), (1, 1000)])])
def test_buffers_take_no_more_than_they_may(entries: int, lengths: list[tuple[int, int]]) -> None:
    """Neither to keep a long capacity for more rows, nor to grow ahead beyond the longest row."""
    cache = StaticRowCache(pipo_model("qwen3").config.text_config, torch.device("cpu"))
    cache.limits = (8, 1024)
    cache.fits = lambda rows, length: math.prod(cache.rounded(rows, length)) <= entries
    for rows, length in lengths:
        assert cache.fits(rows, length)
        cache._reserve(rows, length)
        assert cache.num_entries <= entries
        assert cache.capacity[0] >= rows
        assert cache.capacity[1] >= length


def test_another_gate_is_captured_anew(replaying: None, tmp_path: Path) -> None:
    """Its scale and offset are numbers in a captured step: replayed, that would judge by the gate before."""
    model = pipo_model("qwen3")
    llm = LLM(model)

    def capture(step: Step, undo: Step) -> Step:
        gate = {name: getattr(model.config, name) for name in GATE_SETTINGS}

        def replay() -> None:
            now = {name: getattr(model.config, name) for name in GATE_SETTINGS}
            model.set_gate(**gate)
            step()
            model.set_gate(**now)

        return replay

    graphs_of(llm).capture = capture
    judged = params(threshold=0.5)
    llm.generate(prompt(3, 4), judged)
    for offset in (-50.0, 50.0):
        other = pipo_model("qwen3")
        other.set_gate(confidence_offset=offset)
        other.save_pretrained(tmp_path)
        llm.load_weights(tmp_path)
        output = llm.generate(prompt(3, 4), judged)[0]
        assert (output.num_committed > 0) == (offset > 0)


# --- refusals -----------------------------------------------------------------------------------------


def test_a_replay_that_writes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipo_model("qwen3")

    def broken(step: Step, undo: Step) -> Step:
        return lambda: None

    monkeypatch.setattr(llm_module, "capture_for", lambda device, wanted: None if wanted is False else broken)
    with pytest.raises(UnsupportedModelError, match="cuda_graphs=False"):
        LLM(model, cuda_graphs=True)
    with pytest.warns(UserWarning, match="something else when it is replayed"):
        llm = LLM(model)
    plain = LLM(model, cuda_graphs=False)
    assert llm.generate(prompt(3, 4), FREE)[0].token_ids == plain.generate(prompt(3, 4), FREE)[0].token_ids


def test_a_method_that_has_none_refuses_them(replaying: None) -> None:
    """Fails where they are asked for and silently left out."""
    with pytest.raises(ConfigError, match="'speculative' waits for the host"):
        LLM(base_model("qwen3"), method="speculative", cuda_graphs=True)


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        LLM(pipo_model("qwen3"), cuda_graphs=True)
