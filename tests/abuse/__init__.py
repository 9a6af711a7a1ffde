"""Hostile and faulty input to every stage: tables of cases, what runs them, and random changes of good files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests import from each other, also where pytest does not run
