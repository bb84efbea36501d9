"""kvlib: measure what KV-cache optimisations for LLM inference really buy."""

__version__ = "0.1.0"
