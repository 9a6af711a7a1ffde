"""Passes that write the portable graph."""
