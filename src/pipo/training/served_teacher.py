"""A teacher that is somewhere else: behind an endpoint that scores prompts, or in files that hold what one has said before.

Either gives the best few tokens of each position and the log-probability of the text's own next token. A rejected draft is no
part of the text: its own is known only where it is among the best.

Shape legend: B batch, S steps that have a next pair, N tokens of a text, k known entries.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipo.errors import ConfigError, DataError, EndpointError
from pipo.losses import ServedTeacher
from pipo.losses.teacher import ABSENT
from pipo.model.base import BaseForCausalLM
from pipo.pairing import IGNORE_INDEX, TOKEN1_LABELS, TOKEN2_LABELS, Slots, teacher_tokens
from pipo.training.endpoint import Endpoint
from pipo.training.teacher import step_positions

PARALLEL_REQUESTS = 16
POSITIONS_PER_CHUNK = 256
"""Of a text, whose logits are alive at once while a model that runs here is written down."""


class TextScores(NamedTuple):
    """What a teacher says of a text of N tokens: at `j`, what it expects after token `j`.

    `ids [N, k]`: the best tokens, `ABSENT` where it was not asked (always at the last token). `log_probs [N, k]`: theirs.
    `next_log_probs [N]`: of the token that does follow, NaN where not known.
    """

    ids: Tensor
    log_probs: Tensor
    next_log_probs: Tensor


class TextScorer(Protocol):
    """Scores one text."""

    def score(self, text: list[int], start: int = 0) -> TextScores:
        """What is expected after each token from `start` on."""
        ...


class ServedTeacherModel:
    """Asks an endpoint: vLLM's `/v1/completions` with `prompt_logprobs`, or SGLang's `/generate` with `return_logprob`.

    Args:
        model: the endpoint's name for the teacher (`vllm`); by default the first that it serves.
        top_k: tokens of each position to ask for. vLLM gives as many as its `--max-logprobs` allows.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        vocab_size: int,
        *,
        api: Literal["vllm", "sglang"] = "vllm",
        model: str | None = None,
        top_k: int = 32,
    ) -> None:
        self.endpoint = endpoint
        self.api = api
        self.vocab_size = vocab_size
        self.top_k = min(top_k, vocab_size)
        self.model = endpoint.get("/v1/models")["data"][0]["id"] if api == "vllm" and model is None else model

    def targets(self, rows: Sequence[Slots]) -> tuple[ServedTeacher, ServedTeacher]:
        """See :class:`pipo.training.teacher.TeacherModel`.

        Raises:
            EndpointError: the endpoint can't be reached, refuses, or does not say what it was asked for.
        """
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            scores = list(pool.map(lambda row: self.score(teacher_tokens(row), first_state(row)), rows))
        return served_targets(rows, scores)

    def score(self, text: list[int], start: int = 0) -> TextScores:
        """See :class:`TextScorer`."""
        entries = self._ask_sglang(text, start) if self.api == "sglang" else self._ask_vllm(text)
        if len(entries) != len(text):
            raise EndpointError(f"{self.endpoint.url} scored {len(entries)} tokens of a text of {len(text)}")
        ids = torch.full((len(text), self.top_k), ABSENT)
        log_probs = torch.full(ids.shape, -torch.inf)
        following = torch.full((len(text),), torch.nan)
        for state in range(start, len(text) - 1):
            best, own = entries[state + 1]
            if not best:
                raise EndpointError(
                    f"{self.endpoint.url} says nothing about token {state + 1} of a text of {len(text)}"
                )
            kept = sorted(best, key=lambda entry: -entry[1])[: self.top_k]
            ids[state, : len(kept)] = torch.tensor([token for token, _ in kept])
            log_probs[state, : len(kept)] = torch.tensor([value for _, value in kept])
            following[state] = torch.nan if own is None else own
        return TextScores(self._without_others(ids), log_probs, following)

    def _without_others(self, ids: Tensor) -> Tensor:
        """Entries that the student does not have are no entries."""
        return ids.masked_fill(ids >= self.vocab_size, ABSENT)

    def _ask_vllm(self, text: list[int]) -> list[_Entry]:
        body = {"model": self.model, "prompt": text, "max_tokens": 1, "prompt_logprobs": self.top_k}
        (choice,) = self.endpoint.post("/v1/completions", body)["choices"]
        found = choice.get("prompt_logprobs")
        if found is None:
            raise EndpointError(f"{self.endpoint.url} returns no prompt_logprobs, which a served teacher needs")
        entries: list[_Entry] = []
        for token, known in zip(text, found, strict=False):
            best = [(int(index), float(entry["logprob"])) for index, entry in (known or {}).items()]
            entries.append((best, dict(best).get(token)))
        return entries

    def _ask_sglang(self, text: list[int], start: int) -> list[_Entry]:
        body = {
            "input_ids": text,
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "top_logprobs_num": self.top_k,
            "logprob_start_len": start,
        }
        found: dict[str, Any] = self.endpoint.post("/generate", body)["meta_info"]
        entries: list[_Entry] = [([], None)] * start
        for own, best in zip(found["input_token_logprobs"], found["input_top_logprobs"], strict=True):
            entries.append(([(int(index), float(value)) for value, index, *_ in best or []], own[0]))
        return entries


_Entry = tuple[list[tuple[int, float]], float | None]
"""The best tokens at a token's place with their log-probabilities, and that of the token itself."""


# --- files ----------------------------------------------------------------------------------------------


class TeacherFiles:
    """What a teacher has said of fixed texts, one file each, found by the text's tokens.

    :func:`write_teacher_files` writes them. Rollouts change with the weights, so these serve where texts are given.

    Raises:
        ConfigError: the folder is none.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        if not self.folder.is_dir():
            raise ConfigError(f"teacher.path: {folder} is no folder of a teacher's files")

    def targets(self, rows: Sequence[Slots]) -> tuple[ServedTeacher, ServedTeacher]:
        """See :class:`pipo.training.teacher.TeacherModel`.

        Raises:
            DataError: a text has no file, or it can't be read.
        """
        return served_targets(rows, [self.score(teacher_tokens(row)) for row in rows])

    def score(self, text: list[int], start: int = 0) -> TextScores:
        """See :class:`TextScorer`."""
        path = self.folder / file_name(text)
        if not path.is_file():
            raise DataError(
                f"{self.folder} says nothing of a text of {len(text)} tokens that begins {text[:8]} ({path.name} is missing): "
                "a teacher in files knows the texts that it was written for; use a local or a served one for rollouts"
            )
        try:
            found = load_file(path)
            scores = TextScores(found["ids"].long(), found["log_probs"], found["next_log_probs"])
        except (SafetensorError, OSError, KeyError) as error:
            raise DataError(f"{path} is no file of a teacher's: {error}") from error
        if int(scores.ids.max()) >= self.vocab_size:
            raise DataError(f"{path} holds id {int(scores.ids.max())}, the student's vocabulary is {self.vocab_size}")
        return scores


def file_name(text: Sequence[int]) -> str:
    """Of the file about a text: a hash of its token ids."""
    return hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in text)).hexdigest() + ".safetensors"


def write_teacher_files(folder: str | Path, texts: Iterable[list[int]], scorer: TextScorer) -> int:
    """Write what `scorer` says of each text, whole files only; texts that have theirs are left out. The number written."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    number = 0
    for text in texts:
        path = place / file_name(text)
        if path.is_file():
            continue
        scores = scorer.score(text)
        content = {"ids": scores.ids.int(), "log_probs": scores.log_probs, "next_log_probs": scores.next_log_probs}
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, partial)
        os.replace(partial, path)
        number += 1
    return number


class LocalScorer:
    """The best few tokens of a model that runs here, for :func:`write_teacher_files`."""

    def __init__(self, model: BaseForCausalLM, top_k: int = 32) -> None:
        self.model = model
        self.top_k = top_k

    @torch.no_grad()
    def score(self, text: list[int], start: int = 0) -> TextScores:
        """See :class:`TextScorer`."""
        ids_1N = torch.tensor([text], device=self.model.device)
        (hidden_NH,), _ = self.model.run_backbone(self.model.embed(ids_1N))
        head = self.model.output_map()
        parts = []
        for first in range(0, len(text) - 1, POSITIONS_PER_CHUNK):
            rows = slice(first, min(first + POSITIONS_PER_CHUNK, len(text) - 1))
            log_probs_CV = F.log_softmax(head.logits(hidden_NH[rows]).float(), dim=-1)
            best = log_probs_CV.topk(min(self.top_k, head.vocab_size))
            next_C1 = ids_1N[0, rows.start + 1 : rows.stop + 1, None]
            parts.append((best.indices, best.values, log_probs_CV.gather(1, next_C1)[:, 0]))
        ids, log_probs, following = (torch.cat(found).cpu() for found in zip(*parts, strict=True))
        last = (0, 0, 0, 1)
        return TextScores(
            F.pad(ids, last, value=ABSENT),
            F.pad(log_probs, last, value=-torch.inf),
            F.pad(following, (0, 1), value=torch.nan),
        )


# --- to the student's steps -----------------------------------------------------------------------------


def first_state(row: Slots) -> int:
    """The first of a text's states that a label is compared with."""
    first_label = next((slot for slot, label in enumerate(row.labels) if label != IGNORE_INDEX), len(row.labels))
    return max(0, sum(not pad for pad in row.filler[:first_label]) - 1)


def served_targets(rows: Sequence[Slots], scores: Sequence[TextScores]) -> tuple[ServedTeacher, ServedTeacher]:
    """Scores of the rows' texts, laid out at the student's steps `[B, S]`."""
    texts = [torch.tensor(teacher_tokens(row)) for row in rows]
    first, second = (
        _at_steps(rows, texts, scores, positions_BS, labels)
        for positions_BS, labels in zip(step_positions(rows), (TOKEN1_LABELS, TOKEN2_LABELS), strict=True)
    )
    return first, second


def _at_steps(
    rows: Sequence[Slots], texts: Sequence[Tensor], scores: Sequence[TextScores], positions_BS: Tensor, which: slice
) -> ServedTeacher:
    num_rows, num_steps = positions_BS.shape
    num_known = max(found.ids.shape[1] for found in scores)
    ids = torch.full((num_rows, num_steps, num_known), ABSENT)
    log_probs = torch.full(ids.shape, -torch.inf)
    label_log_probs = torch.full((num_rows, num_steps), torch.nan)
    for index, (row, text, found) in enumerate(zip(rows, texts, scores, strict=True)):
        labels = torch.tensor(row.labels[which])
        at = positions_BS[index, : len(labels)]
        known = slice(0, found.ids.shape[1])
        ids[index, : len(labels), known] = found.ids[at]
        log_probs[index, : len(labels), known] = found.log_probs[at]
        following = text[(at + 1).clamp(max=len(text) - 1)]
        own = found.next_log_probs[at].masked_fill((labels != following) | (at + 1 == len(text)), torch.nan)
        label_log_probs[index, : len(labels)] = own
    return ServedTeacher(ids, log_probs, label_log_probs)
