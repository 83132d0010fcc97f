"""Supervised fine-tuning and on-policy distillation, on transformers' Trainer, peft and accelerate. Sections 3 and 4."""
