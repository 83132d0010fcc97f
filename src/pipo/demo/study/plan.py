"""What the gate study trains, fits and measures. No torch.

The stages of one seed::

    base ─┬─ teacher
          ├─ sft-pad25     PAD ratio at most 0.25, the paper's: the ablation
          └─ sft ─┬─ opd             the paper's gate inside: hidden states, 1 − TV
                  ├─ opd-draft       ours inside: sees the draft, learns whether it is plausible
                  └─ sft-long        as many more steps of sft: the control for both

Stages that are compared see the same batches. Gates are then fitted on frozen models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipo.demo.recipe import Recipe, Stage

if TYPE_CHECKING:
    from pipo.losses import ConfidenceTarget
    from pipo.model.config import ConfidenceFeatures

GateKind = Literal["own", "rule", "fitted"]


@dataclass(frozen=True, slots=True)
class Gate:
    """What decides about drafts: the checkpoint's `own` head, a `rule` without weights, or a head `fitted` on the frozen model."""

    name: str
    label: str
    kind: GateKind
    features: ConfidenceFeatures = "hidden"
    target: ConfidenceTarget = "accept"
    by_teacher: bool = True
    """Whether the teacher says what a draft is worth, or else the model itself in its never-commit reading (fitted only)."""


OWN = Gate("own", "own", "own")
RANDOM = Gate("random", "random", "rule")
PROBABILITY = Gate("probability", "p(draft), not fitted", "rule")
ORACLE = Gate("oracle", "oracle", "rule")
FITTED = (
    Gate("hidden-accept", "hidden, accept", "fitted", "hidden", "accept"),
    Gate("hidden-plausible", "hidden, plausible", "fitted", "hidden", "plausible"),
    Gate("draft-accept", "draft, accept", "fitted", "draft", "accept"),
    Gate("draft-plausible", "draft, plausible", "fitted", "draft", "plausible"),
    Gate("draft-plausible-self", "draft, plausible, no teacher", "fitted", "draft", "plausible", by_teacher=False),
)
BEST = FITTED[3]
GATES = {gate.name: gate for gate in (RANDOM, OWN, PROBABILITY, *FITTED, ORACLE)}

MODELS: dict[str, tuple[Gate, ...]] = {
    "sft": tuple(GATES.values()),
    "opd": tuple(GATES.values()),
    "opd-draft": (OWN,),
    "sft-long": (OWN, BEST),
    "sft-pad25": (RANDOM, OWN, BEST),
}
"""The PIPO models, each with the gates that decide for it."""

PAD_MODELS = {0.25: "sft-pad25", 1.0: "sft"}


@dataclass(frozen=True, slots=True)
class StudyRecipe(Recipe):
    """The demo's model and world, with twice its worked solutions, less OPD and stages of its own."""

    num_fixed_solutions: int = 16384
    opd_steps: int = 600

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, each after those it needs."""

        def sft(name: str, max_pad_ratio: float) -> Stage:
            return Stage(
                name,
                "sft",
                self.sft_steps,
                3e-3,
                1e-3,
                start="base",
                fixed_data=True,
                max_pad_ratio=max_pad_ratio,
                draws="sft",
            )

        def opd(name: str, features: ConfidenceFeatures, target: ConfidenceTarget) -> Stage:
            return Stage(
                name,
                "opd",
                self.opd_steps,
                1.5e-3,
                7e-4,
                start="sft",
                teacher="teacher",
                decay=0.5,
                gate_features=features,
                gate_target=target,
                draws="opd",
            )

        return (
            Stage("base", "regular", self.base_steps, 6e-3, 2e-3),
            Stage("teacher", "regular", self.teacher_steps, 6e-3, 2e-3, start="base"),
            sft("sft", 1.0),
            opd("opd", "hidden", "accept"),
            opd("opd-draft", "draft", "plausible"),
            Stage("sft-long", "sft", self.opd_steps, 3e-3, 1e-3, start="sft", fixed_data=True, decay=0.5),
            sft("sft-pad25", 0.25),
        )


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that decides the outcome, but for the number of seeds."""

    recipe: StudyRecipe = field(default_factory=StudyRecipe)
    """Its `seed` is replaced by each seed of the study."""
    num_problems: int = 200
    """Test problems of each seed, the same for every arm, with four samples each."""
    num_gate_rollouts: int = 3072
    """Rollouts on training problems that gates of a model are fitted on."""
    gate_steps: int = 2000
    """Optimiser steps of a fit."""
    num_tuning_problems: int = 64
    """Training problems that thresholds are set on."""
    tokens_per_step: tuple[float, ...] = (1.92, 1.85, 1.7, 1.5)
    """What thresholds are set to reach: each a point of a gate's curve, beside always and never."""

    def as_json(self) -> dict[str, Any]:
        """The fields, the recipe's included."""
        return asdict(self)


HEADLINE = 1.85
"""The point of the curve that the goal (at least 1.8 tokens per step) is judged at; chosen before anything was measured."""

Place = tuple[str, str, str]
"""Model, gate, point."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """How much more accurate `first` is than `second`, problem by problem. The two reach about the same tokens per step."""

    question: str
    first: Place
    second: Place


def contrasts() -> list[Contrast]:
    """What the study is to answer."""
    at = f"{HEADLINE:g}"
    found: list[Contrast] = []
    for model, title in (("sft", "SFT"), ("opd", "OPD")):
        pairs = {
            "the gate sees the draft (learning accept)": ("draft-accept", "hidden-accept"),
            "the gate sees the draft (learning plausible)": ("draft-plausible", "hidden-plausible"),
            "it learns plausible instead of accept (seeing hidden states)": ("hidden-plausible", "hidden-accept"),
            "it learns plausible instead of accept (seeing the draft)": ("draft-plausible", "draft-accept"),
            "both, against the model's own gate": ("draft-plausible", "own"),
            "both, against the draft's probability alone": ("draft-plausible", "probability"),
            "it learns from a teacher instead of the model itself": ("draft-plausible", "draft-plausible-self"),
        }
        found += [
            Contrast(f"{title}: {question}", (model, first, at), (model, second, at))
            for question, (first, second) in pairs.items()
        ]
    for point in ("always", at, "never"):
        where = f"own gate, ~{at}" if point == at else f"{point} commits"
        found.append(Contrast(f"OPD instead of more SFT ({where})", ("opd", "own", point), ("sft-long", "own", point)))
        found.append(
            Contrast(
                f"our gate inside OPD instead of the paper's ({where})",
                ("opd-draft", "own", point),
                ("opd", "own", point),
            )
        )
    found.append(
        Contrast(
            "our gate inside OPD instead of fitted after it", ("opd-draft", "own", at), ("opd", "draft-plausible", at)
        )
    )
    for gate, point, where in (
        ("own", "always", "always commits"),
        ("random", "1.5", "random gate, ~1.5"),
        ("draft-plausible", at, f"draft, plausible, ~{at}"),
        ("own", "never", "never commits"),
    ):
        found.append(
            Contrast(f"PAD ratio up to 1 instead of 0.25 ({where})", ("sft", gate, point), ("sft-pad25", gate, point))
        )
    return found


FULL = Study()
QUICK = Study(
    recipe=StudyRecipe(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        batch_size=8,
        num_fixed_solutions=64,
        base_steps=30,
        teacher_steps=4,
        sft_steps=6,
        opd_steps=2,
        save_every=5,
    ),
    num_problems=4,
    num_gate_rollouts=32,
    gate_steps=20,
    num_tuning_problems=4,
    tokens_per_step=(1.85, 1.5),
)
"""The same in miniature, for tests: its figures mean nothing."""
