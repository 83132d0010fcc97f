"""An OpenAI-compatible HTTP server on the embedded engine, and its playground page. Extra `serve`."""
