"""What a benchmark of decoding measures: a method in the engine, with random weights of a shape or with those of checkpoints.

All methods of a shape run on the same weights. What a user's request does, these do: the engine's own queue, cache and sampler.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipo.bench.steering import check_rate, steer_gate, steer_verification
from pipo.bench.weights import random_causal_lm, sharing_weights
from pipo.engine.baselines import SpeculativeRunner
from pipo.engine.llm import LLM
from pipo.engine.loading import check_method, kind_of, load_model
from pipo.engine.request import SamplingParams
from pipo.engine.sequence import Sequence as Sample
from pipo.errors import ConfigError
from pipo.kernels.pages import gather
from pipo.model.base import BaseForCausalLM
from pipo.model.config import PipoConfig
from pipo.model.convert import as_dtype
from pipo.model.files import find_checkpoint
from pipo.model.modeling import PipoForCausalLM
from pipo.model.shapes import shape_config

METHODS = ("regular", "mtp", "speculative", "pipo")
DRAFTERS = ("mtp", "speculative", "pipo")
AnyModel = PipoForCausalLM | BaseForCausalLM


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What runs, and how its drafts fare.

    Args:
        shape: random weights of a shape of `pipo.model.shapes`; or models: checkpoints, a regular one, a PIPO one, or both.
        methods: by default `regular` and `pipo`, as far as the checkpoints can decode so.
        commit: share of PIPO's drafts that are committed, whatever the gate says; by default all with random weights, and what the
            gate says of checkpoints. acceptance: share of speculative decoding's drafts that stand; by default the same.
        threshold: τ, in place of `commit`.
        draft_vocab: token ids that drafts are drawn from; by default all.
        engine: further arguments of `LLM`; kernels are `auto` unless it names some, as for a checkpoint.

    Raises:
        ConfigError: naming what can't be.
    """

    shape: str | None = None
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    device: str = "cpu"
    dtype: str | None = "bfloat16"
    commit: float | None = None
    acceptance: float | None = None
    threshold: float | None = None
    draft_vocab: int | None = None
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.shape is None) == (not self.models):
            raise ConfigError("name a shape, or one or two checkpoints in its place")
        if self.shape is not None:
            shape_config(self.shape)
        unknown = [method for method in self.methods or () if method not in METHODS]
        if unknown or self.methods == ():
            raise ConfigError(
                f"methods must be some of {', '.join(METHODS)}, got {unknown[0] if unknown else 'none'!r}"
            )
        if self.commit is not None and self.threshold is not None:
            raise ConfigError("commit and threshold both say which drafts are committed: give one of them")
        for name, rate in (("commit", self.commit), ("acceptance", self.acceptance)):
            if rate is not None:
                check_rate(rate, name)
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, and torch finds no GPU here")

    @property
    def given_commit(self) -> float | None:
        """Share of drafts to commit; `None` where the gate decides."""
        return 1.0 if self.commit is None and self.threshold is None and self.shape is not None else self.commit

    @property
    def given_acceptance(self) -> float | None:
        """Share of drafts to accept; `None` where verification decides."""
        return self.given_commit if self.acceptance is None else self.acceptance


@dataclass(frozen=True)
class Subject:
    """A method, ready to run. `threshold`: what its requests ask for; `commit`: the share it was given, if any."""

    method: str
    llm: LLM
    threshold: float | None = None
    commit: float | None = None
    draft_vocab: int | None = None
    """Token ids that drafts are drawn from; `None`: all."""

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's."""
        config: PreTrainedConfig = self.llm.model.backbone.config
        return config

    @property
    def compressor(self) -> str:
        """The kind of the compressor; a regular model has none, and the default says nothing about it."""
        model = self.llm.model
        return model.config.compressor_type if isinstance(model, PipoForCausalLM) else "mlp"

    def params(self, max_tokens: int | None = None) -> SamplingParams:
        """Greedy, to the end; by default until the context is full."""
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, threshold=self.threshold)

    def prepare(self, prompt_ids: Sequence[int], max_tokens: int | None = None) -> Sample:
        """One request, which arrives now."""
        return self.llm.prepare({"prompt_token_ids": list(prompt_ids)}, self.params(max_tokens))[0]

    def positions(self, context: int, num_steps: int) -> int:
        """Cache entries of a row after so many steps, at most."""
        if self.method == "pipo":
            return (context + 1) // 2 + num_steps
        return context + num_steps * (1 if self.method == "regular" else 2)

    def check_room(self, context: int, num_steps: int) -> None:
        """Raise `ConfigError` for a prompt and steps beyond what the model can hold."""
        needed, room = self.positions(context, num_steps + 1), self.llm.engine.max_model_len
        if needed > room:
            kind = "pairs" if self.method == "pipo" else "tokens"
            raise ConfigError(
                f"a context of {context} tokens and {num_steps} steps take {needed} {kind} of {self.method}, which has "
                f"room for {room}: ask for less, or for another shape"
            )

    def why_too_many(self, batch: int, context: int, num_steps: int) -> str | None:
        """Why so many rows can't run together, if they can't."""
        budget, length = self.llm.engine.budget, self.positions(context, num_steps + 1)
        if batch <= self.llm.engine.max_num_seqs and budget.fits(batch, length):
            return None
        needed = batch * (budget.row_bytes + length * budget.position_bytes)
        return f"caches of {needed / 1e9:.2f} GB do not fit into {budget.total_bytes / 1e9:.2f} GB"


def open_subjects(setting: Setting, max_num_seqs: int) -> list[Subject]:
    """The methods of a setting, in the order asked for, all in this process.

    Raises:
        ConfigError, CheckpointError: a method that the checkpoints can't decode with.
    """
    models = _random_models(setting) if setting.shape is not None else _checkpoint_models(setting)
    return [_open(setting, method, model, max_num_seqs) for method, model in models]


def _random_models(setting: Setting) -> list[tuple[str, AnyModel]]:
    assert setting.shape is not None
    methods = methods_of(setting)
    dtype = as_dtype(setting.dtype or "bfloat16")
    assert dtype is not None
    causal_lm = random_causal_lm(shape_config(setting.shape), dtype, torch.device(setting.device), setting.seed)
    shared = set(map(id, causal_lm.parameters()))
    found: list[tuple[str, AnyModel]] = []
    for method in methods:
        mine = sharing_weights(causal_lm)
        torch.manual_seed(setting.seed)  # of the confidence head's weights
        made = (
            PipoForCausalLM(PipoConfig(mine.config), causal_lm=mine)
            if method == "pipo"
            else BaseForCausalLM(mine, mtp=method in DRAFTERS)
        )
        gather(
            weight for weight in made.parameters() if id(weight) not in shared
        )  # as the engine does with a checkpoint's
        found.append((method, made.eval().requires_grad_(False)))
    return found


def _checkpoint_models(setting: Setting) -> list[tuple[str, AnyModel]]:
    folders = _folders(setting)
    methods = methods_of(setting)
    loaded: dict[str, AnyModel] = {}
    found: list[tuple[str, AnyModel]] = []
    for method in methods:
        kind = _kind_for(method)
        if kind not in folders:
            raise ConfigError(
                f"{method} needs a {'PIPO' if kind == 'pipo' else 'regular'} checkpoint, and none was named"
            )
        check_method(folders[kind], method)
        if kind not in loaded:
            loaded[kind] = load_model(folders[kind], method, setting.device, setting.dtype, None)
            gather(loaded[kind].parameters())
        found.append((method, sharing_weights(loaded[kind])))
    return found


def regular_checkpoint(setting: Setting, scratch: Path) -> Path:
    """A folder with the regular model of a setting, as any engine reads it: the checkpoint, or random weights, written to `scratch`.

    Raises:
        ConfigError: only a PIPO checkpoint was named.
    """
    if setting.shape is not None:
        dtype = as_dtype(setting.dtype or "bfloat16")
        assert dtype is not None
        weights = random_causal_lm(shape_config(setting.shape), dtype, torch.device(setting.device), setting.seed)
        BaseForCausalLM(weights, mtp=False).save_pretrained(scratch)
        return scratch
    for path in setting.models:
        if kind_of(folder := find_checkpoint(path)) == "base":
            return folder
    raise ConfigError(
        f"peers decode regularly, and {', '.join(setting.models)} is a PIPO checkpoint: name a regular one, too"
    )


def methods_of(setting: Setting) -> tuple[str, ...]:
    """The methods that were asked for, or else `regular` and `pipo`, as far as the checkpoints can decode so."""
    if setting.methods is not None:
        return setting.methods
    folders = None if setting.shape is not None else _folders(setting)
    return tuple(method for method in ("regular", "pipo") if folders is None or _kind_for(method) in folders)


def _kind_for(method: str) -> str:
    return "pipo" if method == "pipo" else "base"


def _folders(setting: Setting) -> dict[str, Path]:
    """The checkpoints' folders by their kinds."""
    found: dict[str, Path] = {}
    for path in setting.models:
        folder = find_checkpoint(path)
        if found.setdefault(kind_of(folder), folder) != folder:
            raise ConfigError(
                f"of {', '.join(setting.models)} two are of one kind: name a regular one, a PIPO one, or both"
            )
    return found


def _open(setting: Setting, method: str, model: AnyModel, max_num_seqs: int) -> Subject:
    more = {"kernels": "auto", **setting.engine}
    if setting.draft_vocab is not None and method in DRAFTERS:
        more["draft_vocab"] = setting.draft_vocab
    llm = LLM(model, method=method, max_num_seqs=max_num_seqs, seed=setting.seed, **more)
    threshold, commit = setting.threshold, None
    if isinstance(model, PipoForCausalLM):
        commit = setting.given_commit
        threshold = threshold if commit is None else steer_gate(model, commit, setting.seed)
    elif isinstance(llm.engine.runner, SpeculativeRunner):
        commit = setting.given_acceptance
        if commit is not None:
            steer_verification(llm.engine.runner, commit, setting.seed)
    elif method == "mtp":
        commit = 1.0
    return Subject(method, llm, threshold, commit, more.get("draft_vocab"))


def random_prompts(vocab_size: int, batch: int, context: int, seed: int = 0) -> list[list[int]]:
    """`batch` prompts of `context` random ids, no two alike; the same for every method."""
    generator = random.Random(f"{seed} {batch} {context}")
    return [[generator.randrange(vocab_size) for _ in range(context)] for _ in range(batch)]
