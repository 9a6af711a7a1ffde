"""Checkpoints, the architectures that read them, and their tokenizers; imports nothing, so that commands start at once."""
