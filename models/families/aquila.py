"""Aquila: LLaMA's computation under a name of its own."""

from suture.models.families.llama import ARCHITECTURES, PREFIX, build

__all__ = ["ARCHITECTURES", "PREFIX", "build"]
