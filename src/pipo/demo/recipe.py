"""What the demo trains: sizes, budgets and stages. Budgets are steps, so the same seed gives the same result.

The stages and what each starts from::

    base ─┬─ teacher            more steps on fresh problems: the model that OPD learns from
          ├─ regular            as many steps as sft + opd together, on sft's data: the control that ships as `regular`
          └─ sft ─┬─ opd ── gate  rollouts of the student, scored by the teacher; then a gate that sees the draft, all else frozen
                  └─ sft-long   as many more steps of sft: the control for opd

`base` and `teacher` see a fresh problem every time. `sft`, `regular` and `sft-long` share one limited, fixed set of worked
solutions: as with a real model, good solutions are what is scarce, and rollouts are what is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipo.demo.tokenizer import END_ID, PAD_ID, VOCAB_SIZE
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from pipo.losses import ConfidenceTarget
    from pipo.model.config import ConfidenceFeatures

StageKind = Literal["regular", "sft", "opd", "gate"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run. `matrix_lr` is Muon's rate for the weight matrices, `other_lr` AdamW's for everything else."""

    name: str
    kind: StageKind
    steps: int
    matrix_lr: float
    other_lr: float
    start: str | None = None
    """The stage whose weights it starts from; a regular one gives an sft stage a fresh compressor and confidence head."""
    teacher: str | None = None
    """The stage whose model scores rollouts (opd and gate only)."""
    fixed_data: bool = False
    """Whether it trains on the fixed set of solutions instead of fresh problems."""
    max_pad_ratio: float = 1.0
    """Each solution draws the share of its drafts that is rejected from U[0, max_pad_ratio] (sft only)."""
    gate_features: ConfidenceFeatures = "hidden"
    """What the gate sees; one that is new to drafts starts without making anything of them (opd and gate only)."""
    gate_target: ConfidenceTarget = "accept"
    """What the gate learns from the teacher (opd and gate only)."""
    draws: str = ""
    """Whose batches and random numbers it gets; by default its own. Two stages that are to be compared may share them."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the rates fall."""

    def validate(self) -> None:
        """Raises `ConfigError` for a stage that can't run."""
        if self.steps < 1:
            raise ConfigError(f"stage {self.name!r}: steps must be at least 1, got {self.steps}")
        if (self.kind in ("opd", "gate")) != (self.teacher is not None):
            raise ConfigError(f"stage {self.name!r}: opd and gate stages, and only they, need a teacher")
        if self.kind != "regular" and self.start is None:
            raise ConfigError(f"stage {self.name!r}: {self.kind} needs a stage to start from")
        if self.kind == "sft" and self.gate_features != "hidden":
            raise ConfigError(f"stage {self.name!r}: a gate that sees the draft learns nothing from labels")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome of `pipo demo --train`."""

    seed: int = 0
    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    batch_size: int = 32
    """Problems per step."""
    num_fixed_solutions: int = 8192
    """Worked solutions in the fixed set."""
    mtp_weight: float = 0.15
    """Weight of the MTP loss in regular training; PIPO's is 1."""
    base_steps: int = 1100
    teacher_steps: int = 1500
    sft_steps: int = 1200
    opd_steps: int = 800
    gate_steps: int = 3000
    num_gate_rollouts: int = 6400
    """On training problems: the gate is fitted to their drafts."""
    save_every: int = 50
    """Steps between two resumable states."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, each after those it needs."""
        return (
            Stage("base", "regular", self.base_steps, 6e-3, 2e-3),
            Stage("teacher", "regular", self.teacher_steps, 6e-3, 2e-3, start="base"),
            Stage("sft", "sft", self.sft_steps, 3e-3, 1e-3, start="base", fixed_data=True),
            Stage("regular", "regular", self.sft_steps + self.opd_steps, 3e-3, 1e-3, start="base", fixed_data=True),
            Stage("opd", "opd", self.opd_steps, 1.5e-3, 7e-4, start="sft", teacher="teacher", decay=0.5),
            Stage("sft-long", "sft", self.opd_steps, 3e-3, 1e-3, start="sft", fixed_data=True, decay=0.5),
            Stage(
                "gate",
                "gate",
                self.gate_steps,
                0.0,
                0.0,
                start="opd",
                teacher="teacher",
                gate_features="draft",
                gate_target="plausible",
            ),
        )

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def backbone_config(self) -> dict[str, object]:
        """The backbone's config: a stock Qwen3."""
        return {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "intermediate_size": round(self.hidden_size * 8 / 3 / 32) * 32,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "pad_token_id": PAD_ID,
            "eos_token_id": END_ID,
            "bos_token_id": None,
        }


def stage_folder(out: Path, name: str) -> Path:
    """Where a stage keeps its state and leaves its model."""
    return out / "stages" / name


def stage_model(out: Path, name: str) -> Path:
    """The checkpoint that a finished stage leaves."""
    return stage_folder(out, name) / "model"


def is_done(out: Path, name: str) -> bool:
    """Whether a stage has finished: its run record is the last thing it writes."""
    return (stage_folder(out, name) / "run.json").is_file()
