"""Quantisation of a portable graph: run.py does it, and is imported only where it is asked for: torch takes seconds."""
