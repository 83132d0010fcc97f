"""The study's page: Markdown and plots, made of `results.json` alone, so that no sentence can say what the figures do not. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipo.demo.study.plan import BEST, FITTED, GATES, HEADLINE, MODELS, ORACLE, OWN, PAD_MODELS, RANDOM, Gate
from pipo.demo.study.plot import Curve, Mark, curve_plot

Json = dict[str, Any]
GOAL = -1.0
"""Points of accuracy that a gate may cost, at 1.8 tokens per step or more."""

MODEL_NAMES = {
    "sft": "SFT",
    "opd": "OPD, the paper's gate inside",
    "opd-draft": "OPD, draft + plausible inside",
    "sft-long": "SFT, as many steps as SFT + OPD",
    "sft-pad25": "SFT, PAD ratio ≤ 0.25",
}
OWN_GATES = {
    "sft": "own: learned p(label), the paper's in SFT",
    "opd": "own: learned 1 − TV, the paper's in OPD",
    "opd-draft": "own: sees the draft, learned plausible",
    "sft-long": "own: learned p(label)",
    "sft-pad25": "own: learned p(label)",
}
PLOTTED = ("sft", "opd")


class Findings:
    """`results.json`, by what a reader asks of it."""

    def __init__(self, results: Json) -> None:
        self.results = results
        self._points = {(p["model"], p["gate"], p["point"]): p for p in results["points"]}
        self._gates = {(g["model"], g["gate"]): g for g in results["gates"]}
        targets = sorted(results["study"]["tokens_per_step"], reverse=True)
        self.targets = [f"{target:g}" for target in targets]
        self.headline = min(self.targets, key=lambda name: abs(float(name) - HEADLINE))

    def point(self, model: str, gate: str, point: str) -> Json | None:
        """A row of `points`."""
        return self._points.get((model, gate, point))

    def need(self, model: str, gate: str, point: str) -> Json:
        """One that must be there."""
        found: Json = self._points[model, gate, point]
        return found

    def quality(self, model: str, gate: str) -> Json | None:
        """A row of `gates`."""
        return self._gates.get((model, gate))

    def less_is_worse(self, model: str) -> tuple[list[Gate], int]:
        """The gates that are less accurate at the least tokens per step than at the headline's, and how many have both points."""
        curves = [
            (gate, self.point(model, gate.name, self.targets[-1]), self.point(model, gate.name, self.headline))
            for gate in MODELS[model]
        ]
        known = [(gate, least, most) for gate, least, most in curves if least is not None and most is not None]
        worse = [gate for gate, least, most in known if least["accuracy"]["value"] < most["accuracy"]["value"]]
        return worse, len(known)

    def claims(self) -> list[Json]:
        """The goal, judged for every gate that was made to reach it."""
        candidates = [(model, gate) for model in PLOTTED for gate in FITTED[-2:]] + [("opd-draft", OWN)]
        found = []
        for model, gate in candidates:
            point = self.need(model, gate.name, self.headline)
            found.append(
                {
                    "model": MODEL_NAMES[model],
                    "gate": gate_label(gate, model),
                    "point": point,
                    "never": self.need(model, OWN.name, "never"),
                    "verdict": _verdict(point),
                }
            )
        return found


def _verdict(point: Json) -> str:
    difference, speed = point["to_never"], point["tokens_per_step"]
    if speed < 1.8:
        return "too slow"
    if difference["low"] is not None and difference["low"] >= GOAL:
        return "reached"
    if difference["high"] is not None and difference["high"] < GOAL:
        return "missed"
    return "reached on average, the interval does not exclude a miss" if difference["value"] >= GOAL else "open"


def gate_label(gate: Gate, model: str) -> str:
    """A gate's name on the page."""
    return OWN_GATES[model] if gate == OWN else gate.label


def render_page(results: Json) -> str:
    """`gate.md`."""
    text = resources.files("pipo.demo.study").joinpath("gate.md.j2").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"points": _points, "figure": _figure, "difference": _difference, "spread": _spread}
    names: dict[str, Any] = {
        "found": Findings(results),
        "results": results,
        "gates": list(GATES.values()),
        "best": BEST,
        "own": OWN,
        "random": RANDOM,
        "oracle": ORACLE,
        "models": {name: MODEL_NAMES[name] for name in MODELS},
        "pads": PAD_MODELS,
        "label": gate_label,
        "plots": [plot_name(model) for model in PLOTTED],
    }
    return environment.from_string(text).render(names)


def plot_name(model: str) -> str:
    """The file of a model's plot."""
    return f"gate-{model}.svg"


def render_plots(results: Json) -> dict[str, str]:
    """The plots by the names of their files."""
    found = Findings(results)
    return {plot_name(model): _plot(found, model) for model in PLOTTED}


def _plot(found: Findings, model: str) -> str:
    always, never = (found.need(model, OWN.name, name) for name in ("always", "never"))
    curves = []
    for gate in MODELS[model]:
        own = [point for name in found.targets if (point := found.point(model, gate.name, name)) is not None]
        rows = [found.need(model, ORACLE.name, ORACLE.name)] if gate == ORACLE else [*own, always]
        label = "own (the paper's)" if gate == OWN else gate.label
        curves.append(Curve(label, [_mark(row) for row in rows], dashed=gate == RANDOM))
    title = f"{MODEL_NAMES[model]}: accuracy against tokens per step"
    return curve_plot(curves, _mark(never), "never commits, 1.00", title, "visible tokens per step", "avg@4, %")


def _mark(row: Json) -> Mark:
    accuracy = row["accuracy"]
    low, high = (accuracy["value"] if accuracy[end] is None else accuracy[end] for end in ("low", "high"))
    return Mark(row["tokens_per_step"], accuracy["value"], low, high)


# --- how figures are written ------------------------------------------------------------------------------


def _sign(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _interval(figure: Json, write: Callable[[float], str]) -> str:
    ends = [figure["low"], figure["high"]]
    return "" if None in ends else f" [{write(ends[0])}, {write(ends[1])}]"


def _points(row: Json | None) -> str:
    """Accuracy at tokens per step."""
    return "–" if row is None else f"{row['accuracy']['value']:.1f} @ {row['tokens_per_step']:.2f}"


def _figure(figure: Json) -> str:
    """A percentage with its interval."""
    return f"{figure['value']:.1f}" + _interval(figure, lambda value: f"{value:.0f}")


def _difference(figure: Json | None) -> str:
    """Points with their interval."""
    return "–" if figure is None else _sign(figure["value"]) + _interval(figure, _sign)


def _spread(values: list[float | None], digits: int = 1) -> str:
    """What the single seeds say."""
    return " / ".join("–" if value is None else f"{value:.{digits}f}".replace("-", "−") for value in values)


def write_page(results: Json, folder: Path) -> None:
    """Writes `gate.json`, the page and its plots into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "gate.json").write_text(text, encoding="utf-8")
    (folder / "gate.md").write_text(render_page(results), encoding="utf-8")
    for name, plot in render_plots(results).items():
        (folder / name).write_text(plot, encoding="utf-8")
