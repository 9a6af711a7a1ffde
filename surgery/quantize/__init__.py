"""Quantisation of a portable graph: run.py does it, options.py is its part of the command line, formats.py the choice."""
