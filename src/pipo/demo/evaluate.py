"""Solves fresh problems with every method and counts: accuracy, tokens per step, what the gate did, and how long it took.

Accuracy comes from batched runs of four samples a problem; TTFT and TPOT from runs of one request at a time, methods taking
turns. A sample that is cut off or garbled is a wrong one: it stays in the denominator.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipo.data.generator import WrittenPair
from pipo.demo.eval_task import MAX_TOKENS, TEMPERATURE, TOP_P, judge_pairs
from pipo.demo.tokenizer import END_ID, piece_ids, prompt_ids
from pipo.demo.world import Problem, is_right
from pipo.engine.llm import LLM
from pipo.engine.request import PairRecord, RequestOutput, SamplingParams
from pipo.evaluation.statistics import Interval, normal_interval, standard_error, wilson_interval
from pipo.evaluation.task import JudgedDraft
from pipo.model.base import BaseForCausalLM
from pipo.model.modeling import PipoForCausalLM

SAMPLES = 4
MAX_NUM_SEQS = 64
THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.01)
PAPERS_THRESHOLDS = (0.5, 0.7, 0.9, 0.95)
"""Of the paper's gate, on the same model; always and never are the same with any gate."""

EngineMethod = Literal["regular", "mtp", "speculative", "pipo"]


@dataclass(frozen=True, slots=True)
class Method:
    """One row to be: how which checkpoint decodes. `threshold` is the gate's τ, for PIPO only."""

    name: str
    label: str
    checkpoint: str
    engine: EngineMethod
    threshold: float | None = None


def pipo_methods(checkpoint: str = "pipo", thresholds: Sequence[float] = THRESHOLDS) -> list[Method]:
    """PIPO at every threshold."""
    return [Method("pipo", f"PIPO τ = {threshold_text(t)}", checkpoint, "pipo", t) for t in thresholds]


def threshold_text(threshold: float) -> str:
    """A threshold as the table writes it."""
    if threshold > 1:
        return "never"
    return f"{threshold:g}"


METHODS: tuple[Method, ...] = (
    Method("regular", "regular", "regular", "regular"),
    Method("mtp", "MTP, unverified", "regular", "mtp"),
    Method("speculative", "speculative", "regular", "speculative"),
    *pipo_methods(),
    *(
        Method("papers-gate", f"paper’s gate, τ = {threshold_text(t)}", "papers-gate", "pipo", t)
        for t in PAPERS_THRESHOLDS
    ),
    Method("teacher", "teacher", "teacher", "regular"),
)


@dataclass(slots=True)
class Result:
    """What one method did. Accuracies in percent, times in seconds; NaN where there was nothing to measure."""

    method: Method
    num_problems: int
    correct: list[int]
    """Right samples of each problem, 0 to `SAMPLES`."""
    num_unfinished: int
    num_tokens: int
    num_pairs: int
    num_committed: int
    tokens_per_step_of_samples: list[float]
    drafts: list[JudgedDraft] = field(default_factory=list)
    samples: list[RequestOutput] = field(default_factory=list)
    """Every sample, problem by problem."""
    ttft_s: float = math.nan
    tpot_s: float = math.nan

    @property
    def avg_at_4(self) -> float:
        """Mean share of right samples."""
        return 100 * statistics.fmean(self.correct) / SAMPLES

    @property
    def avg_at_4_interval(self) -> Interval:
        """95% interval of `avg_at_4`, samples clustered by problem."""
        return normal_interval(self.avg_at_4, 100 / SAMPLES * standard_error(self.correct), 0.0, 100.0)

    @property
    def pass_at_4(self) -> float:
        """Share of problems with at least one right sample."""
        return 100 * sum(count > 0 for count in self.correct) / self.num_problems

    @property
    def pass_at_4_interval(self) -> Interval:
        """95% Wilson interval of `pass_at_4`."""
        low, high = wilson_interval(self.pass_at_4 / 100, self.num_problems)
        return (100 * low, 100 * high)

    @property
    def tokens_per_step(self) -> float:
        """Visible tokens per step of the backbone."""
        return self.num_tokens / self.num_pairs

    @property
    def commit_rate(self) -> float:
        """Committed drafts per step."""
        return self.num_committed / self.num_pairs

    def row(self, regular_tpot_s: float) -> dict[str, Any]:
        """The row of `results.json`."""
        return {
            "method": self.method.name,
            "threshold": self.method.threshold,
            "avg_at_4": round(self.avg_at_4, 3),
            "pass_at_4": round(self.pass_at_4, 3),
            "tokens_per_step": round(self.tokens_per_step, 4),
            "commit_rate": round(self.commit_rate, 4),
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "num_problems": self.num_problems,
            "label": self.method.label,
            "avg_at_4_interval": [round(end, 3) for end in self.avg_at_4_interval],
            "pass_at_4_interval": [round(end, 3) for end in self.pass_at_4_interval],
            "speed_up": regular_tpot_s / self.tpot_s,
            "num_samples": self.num_problems * SAMPLES,
            "num_unfinished": self.num_unfinished,
            "mean_tokens": round(self.num_tokens / (self.num_problems * SAMPLES), 3),
        }


class Checkpoints:
    """The demo's models, each loaded once and shared by the methods that run it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self.names = set(folders)
        self._models: dict[str, torch.nn.Module] = {}
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(next(iter(folders.values())))

    def engine(self, method: Method) -> LLM:
        """An engine that runs `method`."""
        if method.checkpoint not in self._models:
            loader = PipoForCausalLM if method.engine == "pipo" else BaseForCausalLM
            self._models[method.checkpoint] = loader.from_pretrained(self._folders[method.checkpoint], dtype="float32")
        return LLM(
            self._models[method.checkpoint],
            device="cpu",
            method=method.engine,
            tokenizer=self.tokenizer,
            max_num_seqs=MAX_NUM_SEQS,
        )


def solve_all(checkpoints: Checkpoints, method: Method, problems: Sequence[Problem], seed: int) -> Result:
    """Four samples of every problem."""
    engine = checkpoints.engine(method)
    ids = piece_ids(checkpoints.tokenizer)
    rng = random.Random(f"samples-{seed}")
    prompts = [{"prompt_token_ids": prompt_ids(problem, ids)} for problem in problems]
    params = [
        _params(method, n=SAMPLES, seed=rng.getrandbits(32), record_pairs=method.engine == "pipo") for _ in problems
    ]
    outputs = engine.generate(prompts, params)
    grouped = [outputs[i : i + SAMPLES] for i in range(0, len(outputs), SAMPLES)]
    pieces = {index: piece for piece, index in ids.items()}
    return Result(
        method=method,
        num_problems=len(problems),
        correct=[sum(is_right_sample(p, o) for o in group) for p, group in zip(problems, grouped, strict=True)],
        num_unfinished=sum(output.finish_reason != "stop" for output in outputs),
        num_tokens=sum(len(output.token_ids) for output in outputs),
        num_pairs=sum(output.num_pairs for output in outputs),
        num_committed=sum(output.num_committed for output in outputs),
        tokens_per_step_of_samples=[len(output.token_ids) / output.num_pairs for output in outputs],
        drafts=[
            d for p, group in zip(problems, grouped, strict=True) for o in group for d in judge_drafts(p, o, pieces)
        ],
        samples=outputs,
    )


def is_right_sample(problem: Problem, output: RequestOutput) -> bool:
    """Whether a sample ended by itself and solves its problem."""
    return output.finish_reason == "stop" and is_right(problem, output.text)


def _params(method: Method, *, seed: int, n: int = 1, record_pairs: bool = False) -> SamplingParams:
    params = SamplingParams(
        temperature=TEMPERATURE, top_p=TOP_P, max_tokens=MAX_TOKENS, seed=seed, n=n, record_pairs=record_pairs
    )
    return params if method.threshold is None else replace(params, threshold=method.threshold)


def judge_drafts(problem: Problem, output: RequestOutput, pieces: dict[int, str]) -> list[JudgedDraft]:
    """Every draft of a sample that comes after a right text, judged by the world's rules."""
    pairs = [
        WrittenPair(
            _text(pair.token1, pieces),
            None if pair.draft is None else _text(pair.draft, pieces),
            pair.confidence,
            pair.committed,
            agreed=None,
        )
        for pair in output.pairs or []
    ]
    return judge_pairs(problem, pairs)


def _text(token: int, pieces: dict[int, str]) -> str:
    """A token as text: nothing where it ends the text, and what is no piece of the world where it is none."""
    return "" if token == END_ID else pieces.get(token, "?")


def measure_speed(
    checkpoints: Checkpoints,
    results: Sequence[Result],
    problems: Sequence[Problem],
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Fills `ttft_s` and `tpot_s` of the results: medians over `problems`, one request at a time, methods taking turns so
    that a busy moment of the machine hits all of them."""
    ids = piece_ids(checkpoints.tokenizer)
    engines = [checkpoints.engine(result.method) for result in results]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in results]
    for index, problem in enumerate([problems[0], *problems]):
        for result, engine, (ttft_s, tpot_s) in zip(results, engines, times, strict=True):
            params = _params(result.method, seed=seed + index)
            [output] = engine.generate([{"prompt_token_ids": prompt_ids(problem, ids)}], params)
            if index and output.ttft_s is not None and output.tpot_s is not None:  # the first round warms up
                ttft_s.append(output.ttft_s)
                tpot_s.append(output.tpot_s)
        advance()
    for result, (ttft_s, tpot_s) in zip(results, times, strict=True):
        result.ttft_s = statistics.median(ttft_s) if ttft_s else math.nan
        result.tpot_s = statistics.median(tpot_s) if tpot_s else math.nan


def shown_pairs(output: RequestOutput, pieces: dict[int, str]) -> list[tuple[str, str, PairRecord]]:
    """The pairs of a sample as text: token 1, draft (empty where none was drawn), and the record."""
    shown = []
    for pair in output.pairs or []:
        draft = "" if pair.draft is None or pair.token1 == END_ID else _spelled(pair.draft, pieces)
        shown.append((_spelled(pair.token1, pieces), draft, pair))
    return shown


def _spelled(token: int, pieces: dict[int, str]) -> str:
    return _text(token, pieces) or " ⏎"
