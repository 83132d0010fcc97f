"""The demo's recipe in miniature: every stage, a second or so each."""

from pipo.demo.recipe import Recipe

MINIATURE = Recipe(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    batch_size=4,
    num_fixed_solutions=16,
    base_steps=40,
    teacher_steps=4,
    sft_steps=4,
    opd_steps=2,
    gate_steps=4,
    num_gate_rollouts=16,
    save_every=5,
)
