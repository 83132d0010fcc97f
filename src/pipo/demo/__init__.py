"""The demo: a tiny world, the models that learn it from scratch on a CPU, and the comparison a newcomer sees first."""
