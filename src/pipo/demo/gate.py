"""The gate stage on problems of the tiny world: drafts of a frozen model, what teachers say of each, and a head that is fitted to it.

The code of `pipo gate`, without its files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipo.demo.distil import roll_out
from pipo.demo.tokenizer import PAD_ID, build_tokenizer, piece_ids, prompt_ids
from pipo.demo.world import draw_problems
from pipo.engine.llm import LLM
from pipo.model.modeling import PipoForCausalLM
from pipo.training.drafts import Drafts, join_drafts, judge_drafts
from pipo.training.teacher import TeacherModel

ROLLOUTS_PER_BATCH = 64
PROMPT_SEED = 86_000


@torch.no_grad()
def gather_drafts(
    model: PipoForCausalLM, teachers: Sequence[TeacherModel], seed: int, num_rollouts: int, say: Callable[[str], None]
) -> list[Drafts]:
    """The drafts of rollouts on training problems, gates from always to never, once for each teacher: by its word."""
    tokenizer = build_tokenizer()
    ids = piece_ids(tokenizer)
    prompts = [prompt_ids(problem, ids) for problem in draw_problems(PROMPT_SEED + seed, num_rollouts, "train")]
    engine = LLM(model, device="cpu", tokenizer=tokenizer, max_num_seqs=ROLLOUTS_PER_BATCH)
    rng = random.Random(f"gate-rollouts-{seed}")
    parts: list[list[Drafts]] = [[] for _ in teachers]
    for start in range(0, num_rollouts, ROLLOUTS_PER_BATCH):
        say(f"rollouts {start}/{num_rollouts}")
        rows = roll_out(engine, prompts[start : start + ROLLOUTS_PER_BATCH], rng)
        first: Drafts | None = None
        for teacher, part in zip(teachers, parts, strict=True):
            drafts = judge_drafts(model, teacher, rows, range(start, start + len(rows)), PAD_ID)
            if first is None:
                first = drafts
            else:  # the states are the same: kept once
                drafts = replace(first, teacher_log_prob=drafts.teacher_log_prob, teacher_best=drafts.teacher_best)
            part.append(drafts)
    return [join_drafts(part) for part in parts]
