"""Weights as others' packers write them."""

from pathlib import Path

WRITTEN = Path(__file__).with_name("compressed_tensors.safetensors")
