"""Fixtures of a running API with a tiny model."""

from served_api import make_engine, served, slow_gguf, tiny_gguf, tiny_loras

__all__ = ["make_engine", "served", "slow_gguf", "tiny_gguf", "tiny_loras"]
