"""The embedded engine: requests in, text out, two tokens read and up to two written per step."""
