"""Corral: your own ollama.com. The rooms and what each may touch are described in docs/architecture.md."""

__version__ = "0.1.0"
