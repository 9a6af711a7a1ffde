"""Moved to contracts.twin: surgery's --verify runs bfloat16 graphs the same way."""

from contracts.twin import float32_twin, has_bfloat16

__all__ = ["float32_twin", "has_bfloat16"]
