"""Evaluation: graders, and the sandbox that runs programs of a model."""
