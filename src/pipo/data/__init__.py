"""Data: conversations to prompts and slots."""
